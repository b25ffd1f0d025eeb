"""The packed format, version 1: exact, loud when damaged, refused by transformers alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from rarefy.activations.attach import attach_gates
from rarefy.activations.gates.topk import TopK
from rarefy.core.attach import detach_gates
from rarefy.core.errors import BadFile, BadInput, Refused
from rarefy.hub.load import load
from rarefy.hub.packed import PackedConv1D, PackedLinear, dequantize, save_packed
from rarefy.layouts import LAYOUTS

transformers = pytest.importorskip("transformers")
GOLDEN = Path(__file__).parent / "golden" / "v1"
IDS = torch.arange(12).view(2, 6)
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back is compared bit for bit; native kernels add in another order, see tests/test_packed_native.py."""
    monkeypatch.setenv("RAREFY_NATIVE", "off")


def llama(dtype: torch.dtype = torch.float32, tied: bool = True) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 27, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=tied)).eval().to(dtype)
    with torch.no_grad():
        for proj in (model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj):
            proj.weight[torch.rand(proj.weight.shape) < 0.6] = 0
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 19), st.floats(0, 1), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 99))
def test_round_trip_and_size(rows: int, columns: int, density: float, dtype: torch.dtype, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g).to(dtype) * (torch.rand(rows, columns, generator=g) < density)
    bitmask = LAYOUTS["bitmask"]
    packed = bitmask.pack(weight)
    bitmask.check(packed, (rows, columns), dtype, "w")
    assert torch.equal(bitmask.unpack(packed, (rows, columns), dtype), weight)
    assert packed.numel() == bitmask.size((rows, columns), int((weight != 0).sum()), dtype) and packed.numel() % 64 == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reload_is_exact_and_the_model_is_left_alone(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    model = llama(dtype, tied)
    before = logits(model)
    record = save_packed(model, None, tmp_path / "out")
    assert torch.equal(logits(model), before) and not hasattr(model.config, "quantization_config")
    assert record["packed"] == 2 and record["bytes_stored"] < record["bytes_dense"]
    assert all(s["dense_because"] for s in record["sites"] if s["density"] == 1)
    again = load(tmp_path / "out").model
    assert isinstance(again.get_submodule(UP), PackedLinear) and torch.equal(logits(again), before)
    dequantize(again)
    again.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(load(tmp_path / "dense").model), before)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3)
    return transformers.GPT2LMHeadModel(config).eval()


def test_gpt2_conv1d_is_packed_and_exact(tmp_path: Path) -> None:
    model = gpt2()
    attach_gates(model, TopK(0.5), ["*.mlp.c_proj"])
    with torch.no_grad():
        for conv in (model.transformer.h[0].mlp.c_fc, model.transformer.h[0].attn.c_attn):
            conv.weight[torch.rand(conv.weight.shape) < 0.6] = 0
            conv.bias.normal_()
    before = logits(model)
    record = save_packed(model, None, tmp_path / "out")
    assert record["packed"] == 3 and torch.equal(logits(model), before)
    again = load(tmp_path / "out").model
    assert isinstance(again.transformer.h[0].mlp.c_fc, PackedConv1D) and torch.equal(logits(again), before)
    assert list(again.transformer.h[0].mlp.c_fc.dense().shape) == [64, 16]
    detach_gates(again)
    dequantize(again).save_pretrained(tmp_path / "dense")
    detach_gates(model)
    assert torch.equal(logits(load(tmp_path / "dense").model), logits(model))


def test_shards_and_saving_again_give_the_same_bytes(tmp_path: Path) -> None:
    model = llama(tied=False)
    save_packed(model, None, tmp_path / "out", max_shard_size="3KB")
    files = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    again = load(tmp_path / "out").model
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again", max_shard_size="3KB")
    for name in [*files, "config.json", "model.safetensors.index.json"]:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    (tmp_path / "out" / files[1]).unlink()
    with pytest.raises(BadFile):
        load(tmp_path / "out")


def test_a_model_read_from_gguf_is_packed_as_the_plain_tensors_it_is(tmp_path: Path) -> None:
    from tests.test_hub_load import write_gguf

    write_gguf(tmp_path / "tiny.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).eval()
    proj = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        proj.weight[torch.rand(proj.weight.shape) < 0.6] = 0
    ids = torch.zeros(1, 3, dtype=torch.long)
    before = model(ids).logits
    assert save_packed(model, None, tmp_path / "out")["packed"] == 1
    again = load(tmp_path / "out").model
    assert torch.equal(again(ids).logits, before) and again.config.quantization_config.quant_method == "rarefy"


def test_a_packed_model_is_not_packed_again(tmp_path: Path) -> None:
    save_packed(llama(), None, tmp_path / "out")
    with pytest.raises(BadInput, match="dequantize"):
        save_packed(load(tmp_path / "out").model, None, tmp_path / "again")


def test_experts_that_files_name_otherwise_reload_and_save_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=3)).eval()
    attach_gates(model, TopK(0.5), ["*.q_proj"])
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[0].zero_()
    record = save_packed(model, None, tmp_path / "out")
    fused = {s["name"].rpartition(".")[2]: s for s in record["sites"] if "experts" in s["name"]}
    assert {name: s["density"] for name, s in fused.items()} == {"gate_up_proj": 1.0, "down_proj": pytest.approx(2 / 3)}
    assert {s["dense_because"] for s in fused.values()} == {"the 3 experts of a fused tensor cannot be packed yet, only Linear and Conv1D"}
    assert record["bytes_dense"] == sum(s["bytes_dense"] for s in record["sites"]) and fused["down_proj"]["bytes_dense"] == 3 * 16 * 24 * 4
    again = load(tmp_path / "out").model
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    with torch.no_grad():
        again.model.layers[0].mlp.experts.down_proj[1, 2, 3] += 1
    with pytest.raises(Refused, match="experts"):
        again.save_pretrained(tmp_path / "changed")


def test_an_undeclared_tie_is_refused(tmp_path: Path) -> None:
    model = llama()
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.weight = mlp.up_proj.weight
    with pytest.raises(Refused, match="tied"):
        save_packed(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not hasattr(model.config, "quantization_config")


def test_golden_folder_loads() -> None:
    expected = load_file(GOLDEN / "expected" / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits(load(GOLDEN / "model").model), expected, rtol=1e-5, atol=1e-6)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_rarefy_is_lazy_and_enough() -> None:
    load_it = f"transformers.AutoModelForCausalLM.from_pretrained({str(GOLDEN / 'model')!r}); print('loaded')"
    done = run(f"import sys, rarefy; assert 'transformers' not in sys.modules; import transformers; {load_it}")
    assert "loaded" in done.stdout, done.stderr


def plan(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    edit(config["quantization_config"])
    file.write_text(json.dumps(config))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little")
    data[8 + header + json.loads(data[8 : 8 + header])[f"{UP}.weight"]["data_offsets"][0]] ^= 1
    file.write_bytes(data)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "truncated"),
    "flipped": (flip, f"{UP}.weight: its sha256"),
    "shape": (lambda f: plan(f, lambda q: q["layers"][UP].update(shape=[28, 16])), "the model has (27, 16)"),
    "negative": (lambda f: plan(f, lambda q: q["layers"][UP].update(shape=[-27, 16])), "two positive integers"),
    "huge": (lambda f: plan(f, lambda q: q["layers"][UP].update(bytes=2**50)), "at most"),
    "layout": (lambda f: plan(f, lambda q: q["layers"][UP].update(layout="zip")), "known layouts are bitmask"),
    "module": (lambda f: plan(f, lambda q: q["layers"].update({"no.where": q["layers"][UP]})), "no such module"),
    "version": (lambda f: plan(f, lambda q: q.update(version=2)), "reads version 1"),
    "pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), "safetensors only"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folder_is_one_sentence(tmp_path: Path, case: str) -> None:
    damage, words = HOSTILE[case]
    folder = tmp_path / "m"
    shutil.copytree(GOLDEN / "model", folder)
    damage(folder)
    with pytest.raises(BadFile) as caught:
        load(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)
