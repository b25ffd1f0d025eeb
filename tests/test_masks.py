"""Masks made elsewhere: exact zeros, torch's reparametrisation taken off without a trace, every wrong mask refused before anything changes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune as torch_prune

from rarefy.cli.main import main
from rarefy.core.errors import BadFile, BadInput
from rarefy.weights.checkpoint import pack
from rarefy.weights.masks import apply_masks, from_torch_prune, read_masks
from tests.test_cli import tiny

__all__ = ["tiny"]
transformers = pytest.importorskip("transformers")


def net() -> Any:
    return nn.Sequential(nn.Linear(8, 6), nn.Conv2d(2, 3, 3), nn.LSTM(4, 5), nn.Linear(6, 2))


def test_torchs_reparametrisation_is_taken_off_and_what_was_pruned_is_plus_zero() -> None:
    model = net()
    keys, dense = set(model.state_dict()), copy.deepcopy(model.state_dict())
    torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
    torch_prune.random_unstructured(model[0], "weight", amount=0.5)  # a container of two methods
    torch_prune.ln_structured(model[1], "weight", amount=1, n=2, dim=0)
    torch_prune.random_unstructured(model[2], "weight_hh_l0", amount=7)
    torch_prune.l1_unstructured(model[0], "bias", amount=2)
    torch_prune.custom_from_mask(model[3], "weight", torch.ones(2, 6))
    masked = {name: module.get_buffer(name.rpartition(".")[2] + "_mask").bool() for name, module in (("0.weight", model[0]), ("1.weight", model[1]))}
    model[3].weight_orig.requires_grad_(False)
    x = torch.randn(3, 8)
    before = model[0](x)
    masks = from_torch_prune(model)
    assert set(masks) == {"0.weight", "0.bias", "1.weight", "2.weight_hh_l0", "3.weight"} and all(torch.equal(masks[name], mask) for name, mask in masked.items())
    assert set(model.state_dict()) == keys and not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model[0](x), before)
    for name, value in model.state_dict().items():
        mask = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, dense[name].masked_fill(~mask, 0)), name
        assert not bool(torch.signbit(value[~mask]).any()), name
    assert isinstance(model[0].weight, nn.Parameter) and model[0].weight.requires_grad and not model[3].weight.requires_grad
    model[0](x).sum().backward()
    assert model[0].weight.grad is not None
    with pytest.raises(BadInput, match="nothing in it was pruned"):
        from_torch_prune(model)


def test_a_pruned_weight_that_was_infinite_is_zero() -> None:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight[0, 1] = float("inf")
    torch_prune.custom_from_mask(layer, "weight", torch.tensor([[1.0, 0.0]]))
    from_torch_prune(layer)
    assert layer.weight[0, 1].item() == 0


@pytest.mark.parametrize("spelling", ["0.weight", "0", "0.weight_mask"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.bfloat16])
def test_zeros_are_where_the_mask_says_and_nothing_else_changes(spelling: str, dtype: torch.dtype) -> None:
    model = net()
    dense = copy.deepcopy(model.state_dict())
    mask = torch.rand(6, 8) < 0.3
    record = apply_masks(model, {spelling: mask.to(dtype)})
    assert [(s["name"], s["kept"], s["error_on"]) for s in record["sites"]] == [("0.weight", int(mask.sum()), "weight")]
    assert record["density"] == int(mask.sum()) / 48
    error = float((dense["0.weight"] * ~mask).norm() / dense["0.weight"].norm())
    assert record["sites"][0]["error"] == record["sites"][0]["error_mask_only"] == pytest.approx(error, rel=1e-5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, dense[name].masked_fill(~mask, 0) if name == "0.weight" else dense[name])


def test_transposed_and_fused_matrices_take_masks_in_their_own_shape() -> None:
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    moe = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=3))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    key = "model.layers.0.mlp.experts.down_proj"
    weight, one = moe.get_parameter(key), torch.rand(moe.get_parameter(key).shape) < 0.4
    assert apply_masks(moe, {key: one})["density"] == int(one.sum()) / one.numel()
    assert torch.equal(weight != 0, one)
    slim = one[1] & (torch.rand(one[1].shape) < 0.5)
    apply_masks(moe, {f"{key}[1]": slim})
    assert torch.equal(weight[1] != 0, slim) and torch.equal(weight[0] != 0, one[0])
    conv = gpt2.transformer.h[0].mlp.c_fc
    mask = torch.rand(conv.weight.shape) < 0.4
    apply_masks(gpt2, {"transformer.h.0.mlp.c_fc": mask})
    assert torch.equal(conv.weight != 0, mask)
    packed = pack(torch.rand(64, 16) < 0.4)  # as `rarefy prune` keeps it: bits of [out, in]
    before = conv.weight.clone()
    apply_masks(gpt2, {"transformer.h.0.mlp.c_fc.weight": packed})
    assert torch.equal(pack((conv.weight != 0).t()), packed & pack((before != 0).t()))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, "no masks"),
    "shape": ({"0": torch.ones(8, 6)}, r"of shape \[8, 6\]: 0.weight has the shape \[6, 8\]"),
    "name": ({"9.weight": torch.ones(6, 8)}, "the model has no such matrix"),
    "bias": ({"0.bias": torch.ones(6)}, "the model has no such matrix"),
    "values": ({"0.weight": torch.full((6, 8), 0.5)}, "besides 0 and 1"),
    "nan": ({"0.weight": torch.full((6, 8), float("nan"))}, "besides 0 and 1"),
    "complex": ({"0.weight": torch.ones(6, 8, dtype=torch.complex64)}, "0 and 1"),
    "twice": ({"0.weight": torch.ones(6, 8), "0": torch.ones(6, 8)}, "another one already"),
    "bits": ({"0.weight": torch.ones(7, dtype=torch.uint8)}, r"of shape \[7\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_mask_is_refused_and_the_model_is_as_before(case: str) -> None:
    model = net()
    dense = copy.deepcopy(model.state_dict())
    masks, words = WRONG[case]
    with pytest.raises(BadInput, match=words) as refused:
        apply_masks(model, {"3.weight": torch.zeros(2, 6), **masks} if masks else {})
    assert "\n" not in str(refused.value) and all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


def test_the_command_line_prunes_by_a_file(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(f"{tiny}/model.safetensors")
    masks = {name: torch.rand(weight.shape) < 0.5 for name, weight in weights.items() if "mlp" in name}
    save_file(masks, tmp_path / "masks.safetensors")
    assert main(["prune", tiny, "--masks", str(tmp_path / "masks.safetensors"), "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(printed, json.loads((Path(__file__).parent.parent / "docs" / "schema" / "prune.v1.json").read_text()))
    assert len(printed["sites"]) == 6 and printed["density"] == sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, weights[name].masked_fill(~masks[name], 0) if name in masks else weights[name]), name
    assert "recipe `masks`" in (tmp_path / "out" / "README.md").read_text()


def test_the_masks_that_prune_keeps_give_the_same_zeros(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half, again = tmp_path / "half", tmp_path / "again"
    assert main(["prune", tiny, "--recipe", "magnitude", "--calibration", f"{tiny}/text.txt", "--calibration-tokens", "512", "--out", str(half)]) == 0
    assert main(["prune", tiny, "--masks", str(half / "masks.safetensors"), "--out", str(again)]) == 0
    capsys.readouterr()
    assert (half / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_a_wrong_file_and_options_beside_it_are_one_sentence(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("no tensors")
    save_file({"lm_head": torch.ones(2, 2, dtype=torch.bool)}, tmp_path / "small.safetensors")
    for code, words, argv in (
        (3, "is not a safetensors file", ["--masks", str(tmp_path / "text")]),
        (2, "no such file", ["--masks", str(tmp_path / "none")]),
        (2, "of shape [2, 2]", ["--masks", str(tmp_path / "small.safetensors")]),
        (2, "--masks and --density", ["--masks", str(tmp_path / "small.safetensors"), "--density", "0.5"]),
        (2, "--masks and --calibration-tokens", ["--masks", str(tmp_path / "small.safetensors"), "--calibration-tokens", "64"]),
        (2, "--masks and --pattern", ["--masks", str(tmp_path / "small.safetensors"), "--pattern", "2:4"]),
    ):
        assert main(["prune", tiny, *argv, "--out", str(tmp_path / "out")]) == code, words
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1 and not (tmp_path / "out").exists()
    with pytest.raises(BadFile):
        read_masks(tmp_path / "text")
