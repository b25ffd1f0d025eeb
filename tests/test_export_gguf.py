"""GGUF files: what the reader, transformers and llama.cpp itself make of them is our model; what cannot be exported is refused by name."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rarefy.activations.gates.threshold import Threshold
from rarefy.cli.main import main
from rarefy.core.attach import attach_gate, attach_view
from rarefy.core.errors import BadInput, DiskError, MissingExtra, Refused
from rarefy.core.roles import View
from rarefy.hub.llama_cpp import export_gguf
from rarefy.hub.llama_cpp.blocks import parse_type, weight_of
from rarefy.hub.load import load
from rarefy.hub.packed import Packed, dequantize, save_packed
from rarefy.surgery.narrow import narrow

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

ROWS, TEXT = 320, "the cat 12 sat on12 the mat, and (12) that is all. "
TEXTS = ("the cat sat", " that's 1234 mats!", "naïve — 日本", "a\n\n  b")
IDS = list(range(5, 29))
MLPS = ("model.layers.0.mlp", "model.layers.1.mlp")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path / "cache"))


def build(family: str = "Llama", **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = getattr(transformers, f"{family}Config")(vocab_size=ROWS, initializer_range=0.2, bos_token_id=0, eos_token_id=1, **(sizes | more))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, value in model.named_parameters():  # norms and biases that do something
        if value.dim() == 1:
            value.data = torch.rand_like(value) if name.endswith("weight") else torch.randn_like(value)
    return model


def byte_level(*before: Any, expression: bool = True) -> Any:
    """A byte-level tokenizer with a few merges, BOS in front of every text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        [TEXT * 3], trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"], show_progress=False)
    )
    assert raw.token_to_id("12") is not None  # so that how digits are split shows
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression)
    raw.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def split(digits: str) -> Any:
    """The splitter of Llama 3 and of Qwen2, which differ in how they take digits."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return pre_tokenizers.Split(Regex(words), "isolated")


def llama3() -> Any:
    tokenizer = byte_level(split(r"\p{N}{1,3}"), expression=False)
    tokenizer.backend_tokenizer.model.ignore_merges = True
    return tokenizer


def qwen2() -> Any:
    return changed(lambda: byte_level(split(r"\p{N}"), expression=False), normalizer=normalizers.NFC())


def sentencepiece() -> Any:
    """A tokenizer as Llama 2 has it: U+2581 for spaces, bytes for what it does not know."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([TEXT * 3], trainers.BpeTrainer(vocab_size=45, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *state["vocab"]]
    merges = [tuple(merge) for merge in state["merges"]]
    raw = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def logits(model: Any, ids: list[int] = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return found


def stored(path: Path) -> dict[str, torch.Tensor]:
    """{name: the values as gguf reads them}."""
    return {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)) for t in gguf.GGUFReader(str(path)).tensors}


def channels(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k of a file as transformers has them: even channels of a head first."""
    head = rows.view(heads, -1, rows.shape[1])
    return torch.cat([head[:, ::2], head[:, 1::2]], 1).reshape(rows.shape)


THEIRS = """
import json, sys
import llama_cpp, numpy as np
ids, texts, files = json.loads(sys.argv[1])
for path in files:
    model = llama_cpp.Llama(path, n_ctx=256, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, flash_attn=False, logits_all=True, verbose=False)
    model.eval(ids)
    rows, greedy = np.array(model.scores[: len(ids)]), []
    for _ in range(12):
        greedy.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(greedy[-1:])
    words = [] if path.endswith("ids.gguf") else [model.tokenize(text.encode(), add_bos=True, special=False) for text in texts]
    np.savez(path + ".npz", logits=rows, greedy=greedy, words=json.dumps(words))
    model.close()
"""


@pytest.fixture(scope="module")
def llama_cpp() -> Callable[..., list[Any]]:
    """What llama.cpp makes of files: logits of `IDS`, 12 greedy tokens after them, its tokens of `TEXTS`; apart, since its native code may crash."""
    if find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")

    def ask(*files: Path) -> list[Any]:
        done = subprocess.run([sys.executable, "-c", THEIRS, json.dumps([IDS, TEXTS, [str(file) for file in files]])], capture_output=True, text=True, timeout=240)
        if done.returncode < 0:
            pytest.skip(f"llama.cpp died of signal {-done.returncode} on this machine")
        assert done.returncode == 0, done.stderr[-2000:]
        found = [np.load(f"{file}.npz") for file in files]
        return [SimpleNamespace(logits=torch.from_numpy(f["logits"]), greedy=f["greedy"].tolist(), words=json.loads(str(f["words"]))) for f in found]

    return ask


def greedy(model: Any) -> list[int]:
    with torch.no_grad():
        return model.generate(torch.tensor([IDS]), max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)[0, len(IDS) :].tolist()


@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_of_the_file_is_ours(tmp_path: Path, tied: bool) -> None:
    model = build(tie_word_embeddings=tied)
    record = export_gguf(model, byte_level(), tmp_path / "m.gguf")
    values = stored(tmp_path / "m.gguf")
    assert len(values) == len(record["tensors"]) == 2 + 2 * 9 + (not tied) and ("output.weight" in values) is not tied
    for row in record["tensors"]:
        heads = {"q_proj": 4, "k_proj": 2}.get(row["name"].split(".")[-2])
        value = values[row["tensor"]]
        assert torch.equal(channels(value, heads) if heads else value, model.get_parameter(row["name"])), row
        assert (row["type"], row["max_abs_err"], row["because"], row["bytes"]) == ("F32", 0, None, 4 * value.numel())
    assert record["bytes"] == (tmp_path / "m.gguf").stat().st_size and record["zeros"] == 0


def test_transformers_loads_the_same_model_and_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = narrow(build(), {path: range(3, 67) for path in MLPS}), byte_level()
    record = export_gguf(model, tokenizer, tmp_path / "m.gguf")
    again = load(tmp_path / "m.gguf")
    torch.testing.assert_close(logits(again.model), logits(model), rtol=0, atol=1e-4)
    assert record["architecture"] == "llama" and again.model.config.intermediate_size == 64
    for text in TEXTS:
        assert again.tokenizer(text).input_ids == tokenizer(text).input_ids


@pytest.mark.parametrize(("layout", "kind"), [("int4", "Q4_0"), ("int4-asymmetric", "Q4_1"), ("int8", "Q8_0"), ("bitmask", "F32")])
def test_codes_are_copied_and_sparse_layouts_become_dense(tmp_path: Path, layout: str, kind: str) -> None:
    model = build()
    for path in MLPS:
        weight = model.get_submodule(path).up_proj.weight.data
        weight[::3, :32] = 0  # groups that are not stored
        weight[torch.rand(weight.shape) < 0.3] = 0
    save_packed(model, None, tmp_path / "packed", layout)
    packed = load(tmp_path / "packed").model
    record = export_gguf(packed, None, tmp_path / "m.gguf")
    values, rows = stored(tmp_path / "m.gguf"), {row["name"]: row for row in record["tensors"]}
    module = packed.get_submodule(f"{MLPS[0]}.up_proj")
    assert isinstance(module, Packed) and rows[f"{MLPS[0]}.up_proj.weight"]["type"] == kind
    assert torch.equal(values["blk.0.ffn_up.weight"], weight_of(module)) and not values["blk.0.ffn_up.weight"][::3, :32].any()
    assert all(row["max_abs_err"] == 0 for row in rows.values())
    if kind != "F32":
        mine = [row for row in rows.values() if row["layout"] == layout]
        assert len(mine) == 14 and {row["type"] for row in mine} == {kind}
    torch.testing.assert_close(stored(tmp_path / "m.gguf")["blk.1.attn_v.weight"], weight_of(packed.model.layers[1].self_attn.v_proj), rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_packed_embeddings_are_written_once_where_they_are_tied(tmp_path: Path, tied: bool) -> None:
    save_packed(build(tie_word_embeddings=tied), None, tmp_path / "packed", "int4", embeddings="int8")
    packed = load(tmp_path / "packed").model
    rows = {row["tensor"]: row for row in export_gguf(packed, None, tmp_path / "m.gguf")["tensors"]}
    assert ("output.weight" in rows) is not tied and (rows["token_embd.weight"]["type"], rows["token_embd.weight"]["layout"]) == ("Q8_0", "int8")
    assert torch.equal(stored(tmp_path / "m.gguf")["token_embd.weight"], weight_of(packed.model.embed_tokens))


def test_values_that_were_quantised_before_find_their_type_again(tmp_path: Path) -> None:
    model = build()
    save_packed(model, None, tmp_path / "packed", "int8")
    dense = dequantize(load(tmp_path / "packed").model)
    dense.lm_head.weight.data = dense.lm_head.weight.data.half().float()
    dense.model.embed_tokens.weight.data = dense.model.embed_tokens.weight.data.bfloat16().float() * 2.0**30
    kinds = {row["tensor"]: row["type"] for row in export_gguf(dense, None, tmp_path / "m.gguf")["tensors"]}
    assert {kinds[f"blk.1.{name}.weight"] for name in ("ffn_up", "ffn_down", "attn_q", "attn_k")} == {"Q8_0"}
    assert (kinds["output.weight"], kinds["token_embd.weight"], kinds["output_norm.weight"]) == ("F16", "BF16", "F32")


def test_a_width_that_blocks_do_not_divide_falls_back_and_says_so(tmp_path: Path) -> None:
    model = narrow(build(), {path: range(50) for path in MLPS})
    save_packed(model, None, tmp_path / "packed", "int8")
    packed = load(tmp_path / "packed").model
    rows = {row["name"]: row for row in export_gguf(packed, None, tmp_path / "m.gguf")["tensors"]}
    down, up = (rows[f"{MLPS[0]}.{name}.weight"] for name in ("down_proj", "up_proj"))
    assert (down["type"], down["because"], down["max_abs_err"]) == ("F32", "50 columns are no multiple of 32", 0)
    assert (up["type"], up["because"]) == ("Q8_0", None)
    asked = {row["name"]: row for row in export_gguf(model, None, tmp_path / "q.gguf", kind="Q4_1")["tensors"]}
    assert (asked[f"{MLPS[0]}.down_proj.weight"]["type"], asked[f"{MLPS[0]}.down_proj.weight"]["because"]) == ("F16", "50 columns are no multiple of 32")
    assert asked[f"{MLPS[0]}.up_proj.weight"]["type"] == "Q4_1"


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_1", "q4_0"])
def test_the_largest_error_of_a_type_that_was_asked_for_is_measured(tmp_path: Path, kind: str) -> None:
    model = build()
    record = export_gguf(model, None, tmp_path / "m.gguf", kind=kind)
    row = next(row for row in record["tensors"] if row["tensor"] == "blk.0.ffn_up.weight")
    weight = model.get_submodule(MLPS[0]).up_proj.weight.detach()
    assert row["type"] == kind.upper() and row["max_abs_err"] == float((stored(tmp_path / "m.gguf")["blk.0.ffn_up.weight"] - weight).abs().max()) > 0
    assert row["bytes"] < weight.numel() * 4


def test_what_float16_cannot_hold_is_float32_and_said(tmp_path: Path) -> None:
    model = build()
    model.lm_head.weight.data[3, 4] = 1e6
    row = next(row for row in export_gguf(model, None, tmp_path / "m.gguf", kind="f16")["tensors"] if row["tensor"] == "output.weight")
    assert (row["type"], row["max_abs_err"], row["because"]) == ("F32", 0, "a magnitude above 65504, the largest of F16")
    with pytest.raises(BadInput, match=r"type 'q3': known are auto, f16, bf16, f32, q4_0, q4_1, q8_0"):
        parse_type("q3")


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: dict[str, Callable[[], Any]] = {
    "plain": build,
    "tied": lambda: build(tie_word_embeddings=True),
    "head-dim": lambda: build(head_dim=32),
    "llama3": lambda: build(rope_parameters=LLAMA3),
    "linear": lambda: build(rope_parameters={"rope_type": "linear", "rope_theta": 5_000.0, "factor": 4.0}),
    "mistral": lambda: build("Mistral", sliding_window=None),
    "qwen2": lambda: build("Qwen2"),
    "narrow": lambda: narrow(build(), {path: range(50) for path in MLPS}),
    "uneven": lambda: narrow(build(), {MLPS[0]: range(64), MLPS[1]: range(5, 45)}),
}


def test_llama_cpp_computes_our_models(tmp_path: Path, llama_cpp: Callable[..., list[Any]]) -> None:
    made = {name: make() for name, make in VARIANTS.items()}
    records = {name: export_gguf(model, None, tmp_path / f"{name}-ids.gguf") for name, model in made.items()}
    assert records["uneven"]["architecture"] == "deci" and records["qwen2"]["architecture"] == "qwen2" and records["mistral"]["architecture"] == "llama"
    for (name, model), theirs in zip(made.items(), llama_cpp(*(tmp_path / f"{name}-ids.gguf" for name in made)), strict=True):
        torch.testing.assert_close(theirs.logits, logits(model), rtol=0, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
        assert theirs.greedy == greedy(model), name


def test_llama_cpp_reads_our_codes_and_our_tokenizers(tmp_path: Path, llama_cpp: Callable[..., list[Any]]) -> None:
    model = build()
    tokenizers = {"gpt-2": byte_level(), "smollm": byte_level(pre_tokenizers.Digits(individual_digits=True)), "spm": sentencepiece(), "llama-bpe": llama3(), "qwen2": qwen2()}
    files = []
    for (name, tokenizer), layout in zip(tokenizers.items(), ("int4-asymmetric", "int8", "int4", "bitmask", "flat"), strict=True):
        save_packed(model, tokenizer, tmp_path / name, layout)
        packed = load(tmp_path / name)
        files.append((tmp_path / f"{name}.gguf", packed))
        assert export_gguf(packed.model, packed.tokenizer, tmp_path / f"{name}.gguf")["tokenizer"] == ("llama" if name == "spm" else "gpt2")
    for (file, packed), theirs in zip(files, llama_cpp(*(file for file, _ in files)), strict=True):
        want = logits(packed.model)  # llama.cpp rounds the inputs of quantised matrices to 8 bits
        assert float((theirs.logits - want).norm() / want.norm()) < 0.03, file
        assert theirs.words == [packed.tokenizer(text).input_ids for text in TEXTS], file


class Twice(View):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def gated() -> Any:
    model = build()
    attach_gate(model, f"{MLPS[1]}.down_proj", Threshold(0.1))
    return model


def viewed() -> Any:
    model = build()
    attach_view(model, f"{MLPS[0]}.up_proj.weight", Twice())
    return model


def adapted() -> Any:
    model = build()
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj, nn.Linear(96, 96))
    return model


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2))


def poisoned(model: Any) -> Any:
    model.lm_head.weight.data[7, 7] = float("nan")
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "gate": (gated, r"the gate on model\.layers\.1\.mlp\.down_proj: llama\.cpp would run the model without it; run rarefy unpack --drop-gates first"),
    "view": (viewed, r"the view on model\.layers\.0\.mlp\.up_proj\.weight"),
    "adapter": (adapted, r"model\.layers\.0\.mlp\.up_proj\.0\.weight of a Linear: llama\.cpp has no place for it"),
    "architecture": (gpt2, "a GPT2LMHeadModel: a GGUF file is written for LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"),
    "nan": (lambda: poisoned(build()), r"lm_head\.weight with NaN or inf"),
    "field": (lambda: build(attention_bias=True), "attention_bias=True of the config"),
    "rope": (lambda: build(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "rope_type='dynamic' of the config"),
    "uneven": (lambda: narrow(build("Qwen2"), {MLPS[0]: range(64)}), r"MLPs of 64 to 96 units: llama\.cpp reads one width for all layers of a qwen2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_by_name_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises((BadInput, Refused), match=words):
        export_gguf(make(), None, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def word_level() -> Any:
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def changed(make: Callable[[], Any], **changes: Any) -> Any:
    """A tokenizer with other steps."""
    tokenizer = make()
    for name, value in changes.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    return tokenizer


TOKENIZERS: dict[str, tuple[Callable[[], Any], str]] = {
    "words": (word_level, "a tokenizer of type WordLevel"),
    "splitter": (lambda: changed(byte_level, pre_tokenizer=pre_tokenizers.Whitespace()), "splits text by Whitespace"),
    "prefix": (lambda: changed(byte_level, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "splits text by ByteLevel"),
    "lower": (lambda: changed(byte_level, normalizer=normalizers.Lowercase()), "normalises text by Lowercase"),
    "spm": (lambda: changed(sentencepiece, normalizer=normalizers.NFKC()), "prepares text by NFKC"),
    "template": (
        lambda: changed(byte_level, post_processor=processors.TemplateProcessing(single="<s> <s> $A", pair="$A $B", special_tokens=[("<s>", 0)])),
        "makes 3 tokens of 1",
    ),
    "rows": (lambda: (tokenizer := byte_level(), tokenizer.add_tokens([f"<{n}>" for n in range(60)]))[0], "the embedding has 320 rows"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tmp_path: Path, case: str) -> None:
    make, words = TOKENIZERS[case]
    with pytest.raises((BadInput, Refused), match=words) as caught:
        export_gguf(build(), make(), tmp_path / "m.gguf")
    assert str(caught.value).endswith("pass --no-tokenizer: llama.cpp then takes token ids.")


def test_a_full_disk_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    model, out = build(), tmp_path / "m.gguf"
    export_gguf(model, None, out)
    before = out.read_bytes()
    model.lm_head.weight.data.zero_()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for least in (100, len(before) // 2):  # in the header, among the tensors
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, limits[1]))
        try:
            with pytest.raises(DiskError, match=r"m\.gguf was not written: a file of it is larger than this system's limit"):
                export_gguf(model, None, out, force=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert out.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    with pytest.raises(Refused, match="nothing is overwritten unasked"):
        export_gguf(model, None, out)
    assert export_gguf(model, None, out, force=True)["zeros"] == 0.2 and out.read_bytes() != before
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_without_gguf_one_sentence_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rarefy.hub.llama_cpp.export.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"gguf is not installed: this verb needs the extra 'hub'; run pip install 'rarefy\[hub\]'"):
        export_gguf(build(), None, tmp_path / "m.gguf")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = build()
    model.get_submodule(MLPS[0]).up_proj.weight.data[:, :40] = 0
    model.save_pretrained(tmp_path / "half")
    byte_level().save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def test_the_command_says_what_was_used_for_each_tensor(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    code, out, err = run(capsys, "export", str(folder), "--out", str(tmp_path / "new" / "half.gguf"), "--type", "q8_0")
    assert code == 0, err
    assert "architecture llama, tokenizer gpt2" in out and "16 tensors in Q8_0, from dense" in out and "5 tensors in F32, from dense" in out and "no value changed" in out
    assert "largest error 0.00" in out and "% of the matrices is zero and stored as zeros: llama.cpp computes with them as with any weight, and gains nothing from them" in out
    code, out, err = run(capsys, "export", str(folder), "--to", "gguf", "--out", str(tmp_path / "ids.gguf"), "--no-tokenizer", "--json")
    record = json.loads(out)
    assert code == 0 and record["tokenizer"] is None and record["tensors"][0]["tensor"] == "token_embd.weight"
    schema = json.loads((Path(__file__).parent.parent / "docs" / "schema" / "export.v1.json").read_text())
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema)
    assert [error.message for error in validator.iter_errors(record)] == []
    for key in schema["required"]:
        assert not validator.is_valid({name: value for name, value in record.items() if name != key}), key


def test_the_command_refuses_in_one_sentence(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "m.gguf")
    build().save_pretrained(tmp_path / "bare")
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.gguf").write_bytes(b"GGUF")
    cases = {
        (str(tmp_path / "none"), "--out", target): (2, "is neither an existing folder or .gguf file"),
        (str(tmp_path / "empty"), "--out", target): (3, "is not a model folder"),
        (str(folder), "--out", target, "--type", "q3_k"): (2, "type 'q3_k': known are auto, f16, bf16, f32, q4_0, q4_1, q8_0"),
        (str(folder), "--out", target, "--to", "onnx"): (2, "format 'onnx': known are gguf"),
        (str(folder), "--out", str(tmp_path / "m.bin")): (5, "a file whose name ends in .gguf; name for example m.gguf"),
        (str(folder), "--out", str(tmp_path / "there.gguf")): (5, "nothing is overwritten unasked"),
        (str(tmp_path / "there.gguf"), "--out", str(tmp_path / "there.gguf"), "--force"): (5, "it is the model that is read"),
        (str(tmp_path / "bare"), "--out", target): (5, "holds no tokenizer"),
    }
    for argv, (wanted, words) in cases.items():
        code, out, err = run(capsys, "export", *argv)
        assert (code, out) == (wanted, "") and words in err and err.count("\n") == 1, (argv, err)
    assert not Path(target).exists()


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "export", "--help")
    assert code == 0 and "Examples:  rarefy export half-int4 --out half.gguf" in out


def test_every_command_of_the_page_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "llama-cpp.md").read_text()
    monkeypatch.chdir(tmp_path)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        assert main(shlex.split(command.replace("MODEL", str(folder)))[1:]) == 0, command
    assert {t.tensor_type.name for t in gguf.GGUFReader("small.gguf").tensors} == {"Q8_0", "F32"} and {t.tensor_type.name for t in gguf.GGUFReader("half.gguf").tensors} == {
        "F16",
        "F32",
    }
