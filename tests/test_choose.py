"""Choosing a layout: what is measured, kept and decided; times themselves are never tested."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rarefy.core.errors import BadInput
from rarefy.hub.packed import PackedLinear, save_packed
from rarefy.runtime import choose
from rarefy.runtime.choose import DENSE, Chooser, measure

transformers = pytest.importorskip("transformers")


def sparse(density: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 64, generator=generator) * (torch.rand(32, 64, generator=generator) < density)


def test_every_lossless_layout_that_holds_the_matrix_is_timed() -> None:
    us = measure(sparse(), [1, 3])
    assert {DENSE, "bitmask"} <= set(us) and not {"int8", "int4", "flat"} & set(us)
    assert all(value > 0 for value in us.values())
    with pytest.raises(BadInput, match=r"batches \[0\]"):
        measure(sparse(), [0])


def test_what_leaves_nothing_out_is_no_candidate() -> None:
    full = torch.randn(64, 64)
    assert set(measure(full, [1])) == {DENSE}
    full[:8] = 0
    assert "compact" in measure(full, [1])
    assert "compact" not in measure(sparse(0.8), [1])


def test_a_sparse_layout_must_win_and_says_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    for bitmask, layout in ((50.0, "bitmask"), (99.0, DENSE), (120.0, DENSE)):
        monkeypatch.setattr(choose, "measure", lambda weight, batches, us=bitmask: {DENSE: 100.0, "bitmask": us})
        choice = Chooser()(sparse())
        assert choice.layout == layout
        assert choice.because.startswith(f"{layout} is fastest here: ")


def test_measurements_are_kept_and_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(weight: torch.Tensor, batches: object) -> dict[str, float]:
        calls.append(tuple(weight.shape))
        return {DENSE: 2.0, "bitmask": 1.0}

    monkeypatch.setattr(choose, "measure", counted)
    chooser = Chooser(journal=tmp_path / "layouts.json")
    assert chooser(sparse()).layout == chooser(sparse() * 3).layout == "bitmask" and len(calls) == 1
    assert Chooser(journal=tmp_path / "layouts.json")(sparse()).us == {DENSE: 2.0, "bitmask": 1.0} and len(calls) == 1
    chooser(sparse(0.1))
    Chooser((1, 64), journal=tmp_path / "layouts.json")(sparse())
    assert len(calls) == 3  # another density, other batches


def test_a_model_is_packed_where_it_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    model.model.layers[0].mlp.up_proj.weight.data.mul_(torch.rand(64, 32) < 0.3)
    monkeypatch.setattr(choose, "measure", lambda weight, batches: {DENSE: 100.0, "bitmask": 10.0 if bool((weight == 0).any()) else 200.0})
    record = save_packed(model, None, tmp_path / "auto", Chooser())
    layouts = {site["name"]: site["layout"] for site in record["sites"]}
    assert record["layout"] == "auto" and layouts.pop("model.layers.0.mlp.up_proj.weight") == "bitmask"
    assert set(layouts.values()) == {None}
    assert {site["dense_because"] for site in record["sites"] if site["layout"] is None} == {"dense is fastest here: 100 us against bitmask 200"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "auto")
    assert isinstance(loaded.model.layers[0].mlp.up_proj, PackedLinear) and type(loaded.model.layers[0].mlp.down_proj) is nn.Linear
