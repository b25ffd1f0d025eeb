"""Optimize for a target: what is stored is what was measured, within the budget, the best of its row; nothing is left behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.activations.gatings.cats import CATS
from rarefy.core.attach import gated
from rarefy.core.errors import BadInput, Refused
from rarefy.hub.load import Loaded, load
from rarefy.layouts import LAYOUTS
from rarefy.runtime.choose import Chooser
from rarefy.search import optimize as module
from rarefy.search.forms import Form, Workshop
from rarefy.search.optimize import Data, Levers, optimize_for
from rarefy.search.targets import TARGETS
from rarefy.surgery.adapters.full import Full
from rarefy.weights.criteria.magnitude import MAGNITUDE
from rarefy.weights.optimize import relative_loss

transformers = pytest.importorskip("transformers")
IDS = torch.randint(1, 61, (600,), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": window[None], "attention_mask": torch.ones(1, len(window), dtype=torch.long)} for window in IDS[:256].split(64)]
DATA = Data(BATCHES, IDS[300:], 1, 64)
LEVERS = Levers(bits=("int8", "int4"), recipes=(MAGNITUDE,), gatings=(CATS,), tolerance=0.2)


def llama() -> Loaded:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=512, initializer_range=0.2)).eval()
    return Loaded(model, None, Path(), "tiny")


def run(out: Path, target: str, max_loss: float = 0.05, levers: Levers = LEVERS, **options: Any) -> dict[str, Any]:
    layout = Chooser((1,), out.parent / "layouts.json")
    return optimize_for(llama(), DATA, {out: TARGETS[target]}, levers, max_loss=max_loss, layout=layout, tokens=2, **options)[out]


def nll(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(IDS[None, :200], use_cache=False).logits[0, :-1], IDS[1:200], reduction="none")


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("target") / "fast"
    return out, run(out, "speed")


def test_the_fastest_form_within_the_budget_is_stored(fast: tuple[Path, dict[str, Any]]) -> None:
    out, record = fast
    fits = [row for row in record["forms"] if row["ok"]]
    best = min(fits, key=lambda row: row["ms_per_token"])
    assert record["chosen"] == best["form"] and record["loss"] == best["loss"] <= 0.05
    assert {"dense", "int8, embeddings int8"} <= {row["form"] for row in record["forms"]}
    assert any("cats" in row["form"] for row in record["forms"]) and any("magnitude" in row["form"] for row in record["forms"])
    kept = {k: v for k, v in record.items() if k not in ("target", "out")}
    assert json.loads((out / "optimize.json").read_text()) == json.loads(json.dumps(kept))
    assert {path.name for path in out.parent.iterdir()} <= {"fast", "layouts.json"}
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) == best["file_bytes"]
    assert load(str(out)).model.config.hidden_size == 32


def test_a_form_is_held_against_its_own_bits(fast: tuple[Path, dict[str, Any]]) -> None:
    rows = {row["form"]: row for row in fast[1]["forms"]}
    for row in rows.values():
        base = rows[row["base"]]
        assert row["over_base_min"] <= row["over_base"] <= row["over_base_max"]
        assert row["base"] != row["form"] or row["over_base"] == row["over_base_min"] == row["over_base_max"] == 1
        assert base["form"] in ("dense", "int8, embeddings int8", "int4, embeddings int8") and row["precision"] == base["precision"]
    sparse = next(row for name, row in rows.items() if "magnitude" in name)
    assert sparse["density"] < 1 and sparse["base"] == "dense"


def test_the_loss_is_that_of_what_was_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_NATIVE", "off")
    record = run(tmp_path / "small", "size", levers=Levers(bits=("int8",), gatings=(CATS,)))
    assert record["chosen"] == "int8, embeddings int8" and not any("cats" in row["form"] for row in record["forms"])  # gates make nothing smaller
    model, dense = load(str(tmp_path / "small")).model, llama().model
    windows = module.cut(DATA.heldout, DATA.bos, DATA.window)
    with torch.no_grad():
        rise = [torch.cat([torch.nn.functional.cross_entropy(m(w[None]).logits[0, :-1], w[1:], reduction="none") for w in windows]) for m in (dense, model)]
    assert record["loss"] == pytest.approx(relative_loss(*rise).value, abs=1e-6) and record["loss"] != 0


def test_no_budget_keeps_the_dense_model(tmp_path: Path) -> None:
    levers = Levers(bits=("int4",), recipes=(MAGNITUDE,), tolerance=0.4)
    record = run(tmp_path / "out", "memory", max_loss=0.0, levers=levers)
    if record["chosen"] == "dense":  # a random model may lose nothing by chance
        assert torch.equal(nll(load(str(tmp_path / "out")).model), nll(llama().model))
    assert record["loss"] <= 0


def test_several_targets_choose_from_the_same_forms(tmp_path: Path) -> None:
    outs = {tmp_path / name: TARGETS[name] for name in ("size", "sparse-speed", "speed")}
    records = optimize_for(llama(), DATA, outs, LEVERS, max_loss=0.2, layout=Chooser((1,), tmp_path / "layouts.json"), tokens=2)
    rows = records[tmp_path / "speed"]["forms"]
    for out, record in records.items():
        best = min((row for row in rows if row["ok"]), key=outs[out].cost)
        assert record["forms"] == rows and record["chosen"] == best["form"]
        assert json.loads((out / "optimize.json").read_text()) == json.loads(json.dumps(record)) and (out / "README.md").is_file()
    sparse = next(row for row in rows if row["form"] == records[tmp_path / "sparse-speed"]["chosen"])
    assert sparse["form"] == sparse["base"] or sparse["over_base_min"] > 1
    assert {path.name for path in tmp_path.iterdir()} == {"size", "sparse-speed", "speed", "layouts.json"}


@pytest.mark.parametrize(("rows", "won"), [([0.9, 0.99], "base"), ([0.9, 1.2, 1.1], 1)])
def test_sparse_speed_wants_a_form_that_was_faster_in_every_round(rows: list[float], won: Any) -> None:
    found = [{"form": "base", "over_base_min": 1.0}, *({"form": n, "over_base_min": least} for n, least in enumerate(rows))]
    assert min(found, key=TARGETS["sparse-speed"].cost)["form"] == won


def test_healing_is_a_lever(tmp_path: Path) -> None:
    training = [window[None] for window in IDS[:256].split(64)]
    levers = Levers(bits=(), recipes=(MAGNITUDE,), healings=(Full(lr=3e-3),), tolerance=0.2)
    loaded, out, told = llama(), tmp_path / "out", []
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    data = dataclasses.replace(DATA, heldout=IDS[:256], training=training)  # scored on what it trains on: it learns for sure
    record = optimize_for(loaded, data, {out: TARGETS["size"]}, levers, max_loss=0.0, layout=Chooser((1,), None), tokens=2, progress=lambda *step: told.append(step[2]))[out]
    assert all(torch.equal(before[key], value) for key, value in loaded.model.state_dict().items())
    tried = [row for row in record["tried"] if "healed by full" in row["form"]]
    assert tried and min(row["loss"] for row in tried) < 0 and record["loss"] <= 0
    healed = next(row for row in record["forms"] if "healed by full" in row["form"])
    assert healed["density"] < 1 and healed["base"] == "dense" and healed["loss"] == pytest.approx(min(t["loss"] for t in tried if t["form"] == healed["form"]), abs=1e-5)
    assert any("heal" in label for label in told)
    with pytest.raises(BadInput, match="healing by full without text"):
        optimize_for(loaded, DATA, {tmp_path / "no": TARGETS["size"]}, levers, max_loss=0.0, layout=Chooser((1,), None))
    with pytest.raises(BadInput, match="no target"):
        optimize_for(loaded, DATA, {}, levers, max_loss=0.0, layout=Chooser((1,), None))


def test_a_killed_search_repeats_no_finished_try_and_leaves_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    loaded, out = llama(), tmp_path / "out"
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_store", stop)
        optimize_for(loaded, DATA, {out: TARGETS["speed"]}, LEVERS, max_loss=0.05, layout=Chooser((1,), None), tokens=2)
    assert not out.exists() and all(torch.equal(before[key], value) for key, value in loaded.model.state_dict().items()) and not gated(loaded.model)
    again = run(out, "speed")
    assert again["tried"] and all(row["reused"] for row in again["tried"])
    assert not Path(f"{out}.tries.json").exists()


def test_a_form_is_undone_after_an_error_too() -> None:
    loaded = llama()
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    form = Form(bits="int4", embeddings="int8", gating=dataclasses.replace(CATS, density=0.5))
    with pytest.raises(KeyError), Workshop(BATCHES, {}).applied(loaded.model, form):
        assert gated(loaded.model)
        weight = loaded.model.model.layers[0].mlp.up_proj.weight
        assert torch.equal(LAYOUTS["int4"].unpack(LAYOUTS["int4"].pack(weight), tuple(weight.shape), weight.dtype), weight)
        raise KeyError
    assert all(torch.equal(before[key], value) for key, value in loaded.model.state_dict().items()) and not gated(loaded.model)


@pytest.mark.parametrize("layout", ["int8", "int4", "int4-asymmetric"])
def test_rounded_weights_are_stored_as_they_are(layout: str) -> None:
    weight = torch.randn(31, 70, generator=torch.Generator().manual_seed(2))
    once = LAYOUTS[layout].unpack(LAYOUTS[layout].pack(weight), (31, 70), torch.float32)
    assert torch.equal(LAYOUTS[layout].unpack(LAYOUTS[layout].pack(once), (31, 70), torch.float32), once)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a budget is not negative"):
        run(tmp_path / "out", "speed", max_loss=-0.1)
    with pytest.raises(BadInput, match="1 calibration windows"):
        optimize_for(llama(), dataclasses.replace(DATA, batches=BATCHES[:1]), {tmp_path / "out": TARGETS["speed"]}, LEVERS, max_loss=0.1, layout=Chooser((1,), None))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("kept")
    with pytest.raises(Refused, match="nothing is overwritten"):
        run(tmp_path / "there", "speed")
