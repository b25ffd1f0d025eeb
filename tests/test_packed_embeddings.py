"""An embedding and an output head that are packed: tied or not, exact to their layout, smaller on disk, read row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rarefy.cli.main import main
from rarefy.core.errors import BadFile, BadInput, Refused
from rarefy.hub.load import load
from rarefy.hub.packed import PackedEmbedding, PackedLinear, dequantize, save_packed
from rarefy.kernels.library import native
from rarefy.layouts import LAYOUTS

transformers = pytest.importorskip("transformers")
IDS = torch.arange(12).view(2, 6)
ENDS = ("model.embed_tokens", "lm_head")


def llama(tied: bool = True) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=tied, initializer_range=0.3)).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def rounded(model: Any, layout: str) -> Any:
    """The same model with its ends as the layout gives them back."""
    with torch.no_grad():
        for weight in dict.fromkeys([model.get_input_embeddings().weight, model.get_output_embeddings().weight]):
            weight.copy_(LAYOUTS[layout].unpack(LAYOUTS[layout].pack(weight), tuple(weight.shape), weight.dtype))
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["int8", "int4", "flat"])
def test_reloads_as_the_layout_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, layout: str) -> None:
    monkeypatch.setenv("RAREFY_NATIVE", "off")
    model = llama(tied)
    record = save_packed(model, None, tmp_path / "out", embeddings=layout)
    assert model.get_input_embeddings().weight.dtype == torch.float32  # left alone
    back = load(str(tmp_path / "out")).model
    embedding, head = back.get_input_embeddings(), back.get_output_embeddings()
    assert type(embedding) is PackedEmbedding and type(head) is PackedLinear and (embedding.weight is head.weight) == tied
    assert torch.equal(logits(back), logits(rounded(llama(tied), layout)))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not tied) and stored["model.embed_tokens.weight"].numel() == LAYOUTS[layout].size((61, 32), 61 * 32, torch.float32)
    ends = {site["name"].removesuffix(".weight"): site for site in record["sites"] if site["name"].removesuffix(".weight") in ENDS}
    assert [ends[path]["bytes"] for path in ENDS] == [stored["model.embed_tokens.weight"].numel(), 0 if tied else stored["lm_head.weight"].numel()]
    assert (ends["lm_head"]["error"] == 0) == (layout == "flat")


@pytest.mark.parametrize("tied", [True, False])
def test_saved_again_it_has_the_same_bytes_and_a_damaged_one_is_refused(tmp_path: Path, tied: bool) -> None:
    save_packed(llama(tied), None, tmp_path / "out", embeddings="int8")
    load(str(tmp_path / "out")).model.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    raw = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    raw[-1] ^= 255
    (tmp_path / "out" / "model.safetensors").write_bytes(raw)
    with pytest.raises(BadFile, match="sha256"):
        load(str(tmp_path / "out"))


def test_a_sharded_folder_counts_the_tied_tensor_once(tmp_path: Path) -> None:
    save_packed(llama(), None, tmp_path / "out", embeddings="int8", max_shard_size="20KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(stored) > 1 and index["metadata"]["total_parameters"] == sum(tensor.numel() for shard in stored for tensor in shard.values())
    assert logits(load(str(tmp_path / "out")).model).isfinite().all()


def test_dequantized_it_is_plain_and_tied_again(tmp_path: Path) -> None:
    save_packed(llama(), None, tmp_path / "out", embeddings="int8")
    back = dequantize(load(str(tmp_path / "out")).model)
    assert type(back.get_input_embeddings()) is nn.Embedding and back.get_output_embeddings().weight is back.get_input_embeddings().weight
    assert torch.equal(logits(back), logits(rounded(llama(), "int8")))


def test_conv1d_models_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_NATIVE", "off")

    def gpt2() -> Any:
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()

    save_packed(gpt2(), None, tmp_path / "out", embeddings="int8")
    back = load(str(tmp_path / "out")).model
    assert type(back.transformer.wte) is PackedEmbedding and type(back.transformer.wpe) is nn.Embedding
    assert torch.equal(logits(back), logits(rounded(gpt2(), "int8")))


@pytest.mark.skipif(native() is None, reason="the native kernels were not built here")
def test_the_decoder_reads_its_rows(tmp_path: Path) -> None:
    from rarefy.hub.decoder import use_decoder

    save_packed(llama(), None, tmp_path / "out", embeddings="int8")
    want = rounded(llama(), "int8").generate(IDS[:1], max_new_tokens=20, do_sample=False)
    ours = use_decoder(load(str(tmp_path / "out")).model)
    assert torch.equal(ours.generate(IDS[:1], max_new_tokens=20, do_sample=False), want)
    with pytest.raises(BadInput, match="a token id of 61"):
        ours(torch.tensor([[3, 61]]), use_cache=True)
    with pytest.raises(BadInput, match="a token id of -1"):
        ours(torch.tensor([[3, -1]]), use_cache=True)


def test_what_cannot_be_packed_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="single rows cannot be read"):
        save_packed(llama(), None, tmp_path / "out", embeddings="bitmask")
    with pytest.raises(BadInput, match="known layouts are"):
        save_packed(llama(), None, tmp_path / "out", embeddings="int7")
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    gemma = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes))
    with pytest.raises(Refused, match="Gemma3TextScaledWordEmbedding"):
        save_packed(gemma, None, tmp_path / "out", embeddings="int8")
    assert not (tmp_path / "out").exists()


def test_a_plan_that_packs_an_embedding_without_rows_is_refused(tmp_path: Path) -> None:
    model = llama(tied=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 5:] = 0
    packed = LAYOUTS["bitmask"].pack(model.get_input_embeddings().weight)
    from rarefy.hub.plan import Layer

    layer = Layer.of(model.get_input_embeddings().weight, packed, "bitmask")
    with pytest.raises(BadFile, match="single rows cannot be read"):
        PackedEmbedding(layer, packed)(IDS)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "plain")
    assert main(["pack", str(tmp_path / "plain"), "--out", str(tmp_path / "out"), "--layout", "int4", "--embeddings", "int8", "--json"]) == 0
    sites = {site["name"]: site["layout"] for site in json.loads(capsys.readouterr().out)["sites"]}
    assert sites["model.embed_tokens.weight"] == "int8" and sites["model.layers.0.mlp.up_proj.weight"] == "int4"
