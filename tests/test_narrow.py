"""Narrow: fewer hidden units in really smaller matrices, and a folder whose plan rebuilds them, or raises."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rarefy.core.attach import attach_gate, attach_view, gated
from rarefy.core.errors import BadFile, BadInput, Refused
from rarefy.core.roles import View
from rarefy.surgery.narrow import Narrow, edits, narrow, replay, widen

transformers = pytest.importorskip("transformers")
from rarefy.activations.gates.topk import TopK  # noqa: E402
from rarefy.hub.load import load  # noqa: E402
from rarefy.hub.packed import PackedLinear, dequantize, save_packed  # noqa: E402
from tests.test_format import IDS, logits, plan  # noqa: E402
from tests.test_gates import seal  # noqa: E402

MLP = "model.layers.0.mlp"
KEPT = [i for i in range(27) if i % 4]
GOLDEN = Path(__file__).parent / "golden" / "narrow-v1"


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back is compared bit for bit; native kernels add in another order, see tests/test_packed_native.py."""
    monkeypatch.setenv("RAREFY_NATIVE", "off")


def llama(layers: int = 2, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 27, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=layers, **more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def masked(model: Any, path: str, kept: list[int]) -> Any:
    """The dense model with the other units' columns at zero."""
    with torch.no_grad():
        weight = model.get_submodule(path).down_proj.weight
        keep = torch.zeros(weight.shape[1], dtype=torch.bool)
        keep[kept] = True
        weight[:, ~keep] = 0
    return model


@pytest.mark.parametrize("bias", [False, True])
def test_narrow_is_the_masked_model_with_smaller_matrices(bias: bool) -> None:
    model = llama(mlp_bias=bias)
    wanted, dense = logits(masked(copy.deepcopy(model), MLP, KEPT)), logits(model)
    count = sum(p.numel() for p in model.parameters())
    narrow(model, {MLP: KEPT})
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, dense, atol=1e-3)
    mlp, other = model.model.layers[0].mlp, model.model.layers[1].mlp
    assert mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape == (20, 16) and mlp.down_proj.weight.shape == (16, 20)
    assert (mlp.up_proj.out_features, mlp.down_proj.in_features) == (20, 20) and other.up_proj.weight.shape == (27, 16)
    assert count - sum(p.numel() for p in model.parameters()) == 7 * (3 * 16 + 2 * bias)
    assert edits(model) == (Narrow((f"{MLP}.gate_proj", f"{MLP}.up_proj"), (f"{MLP}.down_proj",), 27, 20),)


def test_gpt2_is_narrowed_through_its_conv1d() -> None:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3)).eval()
    kept = list(range(0, 64, 3))
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        wanted.transformer.h[0].mlp.c_proj.weight[[i for i in range(64) if i not in kept]] = 0
    narrow(model, {"transformer.h.0.mlp": kept})
    torch.testing.assert_close(logits(model), logits(wanted), rtol=1e-5, atol=1e-5)
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (16, 22) and model.transformer.h[0].mlp.c_fc.nf == 22


@pytest.mark.parametrize("pack", [False, True])
def test_a_narrow_folder_reloads_bit_for_bit(tmp_path: Path, pack: bool) -> None:
    model = llama()
    if pack:
        with torch.no_grad():
            for p in (model.model.layers[0].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight):
                p[torch.rand(p.shape) < 0.7] = 0
    narrow(model, {MLP: KEPT})
    if pack:
        attach_gate(model, f"{MLP}.down_proj", TopK(0.5))
    before = logits(model)
    record = save_packed(model, None, tmp_path / "out")
    assert record["packed"] == 3 * pack and record["edits"][0]["to"] == 20 and torch.equal(logits(model), before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), before) and edits(again) == edits(model)
    assert isinstance(again.get_submodule(f"{MLP}.up_proj"), PackedLinear) is pack and bool(gated(again)) is pack
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_golden_narrow_folder_loads_and_widens() -> None:
    from safetensors.torch import load_file

    expected = load_file(GOLDEN / "expected" / "logits.safetensors")["logits"]
    model = load(GOLDEN / "model").model
    assert model.model.layers[0].mlp.down_proj.in_features == 20 and expected.shape[:2] == IDS.shape
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_dequantize_widens_to_what_transformers_loads(tmp_path: Path) -> None:
    model = load(GOLDEN / "model").model
    before = logits(model)
    dequantize(model).save_pretrained(tmp_path / "dense")
    plain = load(tmp_path / "dense").model
    assert not edits(plain) and plain.model.layers[0].mlp.down_proj.in_features == 27 and not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(logits(plain), before, rtol=1e-5, atol=1e-5)


def test_narrowing_twice_replays_in_order_and_widens_back(tmp_path: Path) -> None:
    model = llama(1)
    narrow(narrow(model, {MLP: KEPT}), {MLP: range(11)})
    assert [(e.width, e.kept) for e in edits(model)] == [(27, 20), (20, 11)]
    save_packed(model, None, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out").model), logits(model))
    before = logits(model)
    widen(model)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (27, 16) and not edits(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


class Normed(nn.Module):
    """Its units are mixed by a norm before they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 9), nn.LayerNorm(9), nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(self.norm(self.up(x)))
        return result


class Same(View):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


def viewed_llama() -> Any:
    model = llama(1)
    attach_view(model, f"{MLP}.up_proj.weight", Same())
    return model


def tied_mlp() -> nn.Module:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4)), nn.Linear(4, 9))
    model[1].weight = model[0][0].weight  # type: ignore[index]
    return model


REFUSED: dict[str, tuple[Callable[[], Any], Any]] = {
    "mixed": (lambda: narrow(Normed(), {"": [0, 1]}), "mixes them"),
    "attention": (lambda: narrow(llama(1), {"model.layers.0.self_attn": [0, 1]}), "do not share one hidden width"),
    "no such module": (lambda: narrow(llama(1), {"model.nowhere": [0]}), "no such module"),
    "empty": (lambda: narrow(llama(1), {MLP: []}), "at least one"),
    "all": (lambda: narrow(llama(1), {MLP: range(27)}), "not all"),
    "twice": (lambda: narrow(llama(1), {MLP: [1, 1]}), "distinct"),
    "outside": (lambda: narrow(llama(1), {MLP: [27]}), "below 27"),
    "negative": (lambda: narrow(llama(1), {MLP: [-1]}), "below 27"),
    "view": (viewed_llama, "under a view"),
    "tied": (tied_mlp, "shares its tensor"),
    "twice in one call": (lambda: narrow(llama(1), {MLP: [0], "again": [1]}, coupled={"again": ([f"{MLP}.gate_proj"], [f"{MLP}.down_proj"])}), "same matrices"),
    "widths": (lambda: narrow(llama(1), {MLP: [0]}, coupled={MLP: ([f"{MLP}.up_proj"], ["lm_head"])}), "share one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused_and_nothing_changes(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises((BadInput, Refused), match=words):
        made = make()
        narrow(made, {MLP if case == "view" else "0": [0, 1]})


def test_a_refusal_leaves_earlier_layers_alone() -> None:
    model = llama()
    with pytest.raises(BadInput, match="below 27"):
        narrow(model, {MLP: KEPT, "model.layers.1.mlp": [99]})
    assert model.model.layers[0].mlp.up_proj.weight.shape == (27, 16) and not edits(model)


def test_explicit_coupling_is_taken_at_its_word() -> None:
    model, x = Normed(), torch.randn(2, 4)
    narrow(model, {"": [0, 4]}, coupled={"": (["up"], ["down"])})
    assert model.up.weight.shape == (2, 4) and model.down.weight.shape == (4, 2)
    with pytest.raises(RuntimeError):
        model(x)


def test_shapes_edited_by_hand_do_not_save(tmp_path: Path) -> None:
    model = llama(1)
    mlp = model.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(16, 20, bias=False), nn.Linear(16, 20, bias=False), nn.Linear(20, 16, bias=False)
    with pytest.raises(Refused, match="config and plan build"):
        save_packed(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_replay_refuses_another_width() -> None:
    with pytest.raises(BadInput, match="27 units"):
        replay(llama(1), Narrow((f"{MLP}.gate_proj", f"{MLP}.up_proj"), (f"{MLP}.down_proj",), 28, 20))


def edit(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: seal(folder, lambda q: q["edits"][0].update(changes))


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tampered": (lambda f: plan(f, lambda q: q["edits"][0].update(to=19)), "sha256 is not that of its own fields"),
    "narrower than the file": (edit(to=19), "the model has (16, 19) there"),
    "wider than it was": (edit(to=28), "the second is smaller"),
    "another width": (edit(**{"from": 28}), "the model has 27 units there"),
    "zero": (edit(to=0), "positive integers"),
    "huge": (edit(**{"from": 2**40}), "positive integers"),
    "boolean": (edit(to=True), "positive integers"),
    "half the MLP": (edit(rows=[f"{MLP}.up_proj"]), "gate_proj.weight of shape [20, 16]: config and plan build [27, 16]"),
    "no such module": (edit(rows=["model.nowhere"]), "outputs of Linear"),
    "same twice": (edit(rows=[f"{MLP}.up_proj", f"{MLP}.up_proj"]), "each named once"),
    "attention": (edit(rows=["model.layers.0.self_attn.q_proj"]), "share one"),
    "traversal": (edit(rows=["../up_proj"]), "letters, digits"),
    "not a list": (edit(rows="up_proj"), "lists of paths"),
    "unknown edit": (edit(edit="slice"), "known edit is narrow"),
    "dropped": (lambda f: seal(f, lambda q: q["edits"].clear()), "the model has"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_narrow_folder_is_one_sentence_and_code_3(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rarefy.cli.main import main

    damage, words = HOSTILE[case]
    folder = tmp_path / "m"
    shutil.copytree(GOLDEN / "model", folder)
    damage(folder)
    with pytest.raises(BadFile) as caught:
        load(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    capsys.readouterr()
    assert main(["eval", str(folder)]) == 3
    assert "Traceback" not in capsys.readouterr().err
