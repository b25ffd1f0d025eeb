"""Generation equals transformers' own greedy search; its figures add up."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rarefy.core.errors import BadInput
from rarefy.kernels.library import SWITCH, native
from rarefy.probes import timers
from rarefy.probes.generation import generate

transformers = pytest.importorskip("transformers")


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, words: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(c) - 97 for c in words]], dtype=torch.long)}

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        return "".join(chr(97 + i) for i in ids.tolist())


def llama() -> Any:
    torch.manual_seed(4)
    sizes = {"vocab_size": 26, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=64, eos_token_id=None, bos_token_id=None)).eval()


def gpt2() -> Any:
    torch.manual_seed(5)
    sizes = {"vocab_size": 26, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, eos_token_id=None, bos_token_id=None)).eval()


@pytest.mark.parametrize("build", [llama, gpt2])
def test_text_equals_transformers_greedy_search(build: Any) -> None:
    model, tokenizer = build(), Letters()
    ids = tokenizer("sparse", return_tensors="pt")["input_ids"]
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0)
    record = generate(model, tokenizer, "sparse", tokens=20, runs=2)
    assert record["text"] == tokenizer.decode(theirs[0, 6:], True)
    assert record["tokens"] == 20
    assert len(set(record["text"])) > 2  # not one letter for ever, where any two searches agree


def test_the_end_of_the_text_ends_it() -> None:
    model = llama()
    free = generate(model, Letters(), "sparse", tokens=12, runs=1)["text"]
    end = free[3]
    model.generation_config.eos_token_id = ord(end) - 97
    stopped = generate(model, Letters(), "sparse", tokens=12, runs=1)
    assert stopped["text"] == free[: free.index(end) + 1]


def test_figures() -> None:
    model = llama()
    record = generate(model, Letters(), "sparse", tokens=8, runs=3)
    low, high = record["decode_spread"]
    assert 0 < low <= record["decode_tokens_per_s"] <= high
    assert record["model_bytes"] == sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert record["rss_bytes"] > record["model_bytes"]
    assert generate(model, Letters(), "sparse", tokens=1, runs=1)["decode_tokens_per_s"] is None


@pytest.mark.parametrize(("prompt", "asked"), [("", {}), ("sparse", {"tokens": 0}), ("sparse", {"tokens": 59}), ("sparse", {"tokens": 4, "runs": 0})])
def test_refuses(prompt: str, asked: dict[str, int]) -> None:
    with pytest.raises(BadInput):
        generate(llama(), Letters(), prompt, **({"runs": 1} | asked))


def test_rounds_report_the_median_and_the_spread() -> None:
    naps = iter([0.0, 0.02, 0.05])
    timing = timers.rounds(lambda: time.sleep(next(naps)), 3)
    assert timing.fastest < 0.02 <= timing.median < 0.05 <= timing.slowest


def test_a_busy_machine_is_reported_and_a_quiet_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = timers.os.cpu_count() or 1
    for load, expected in ((0.1 * cores, False), (0.9 * cores, True)):
        monkeypatch.setattr(timers, "os", SimpleNamespace(getloadavg=lambda load=load: (load, 0, 0), cpu_count=lambda: cores))
        assert (timers.busy() is not None) == expected


def test_the_native_engine_writes_the_same_text_and_auto_says_why_not() -> None:
    if native() is None:
        pytest.skip("the native kernels were not built here")
    words = generate(llama(), Letters(), "abc", tokens=40, runs=1)
    fast = generate(llama(), Letters(), "abc", tokens=40, runs=1, engine="auto")
    assert fast["engine"].startswith("rarefy, native kernels") and fast["text"] == words["text"]
    other = generate(gpt2(), Letters(), "abc", tokens=5, runs=1, engine="auto")
    assert other["engine"].startswith("transformers (a GPT2LMHeadModel: the native decoder knows LlamaForCausalLM")
    with pytest.raises(BadInput, match="a GPT2LMHeadModel"):
        generate(gpt2(), Letters(), "abc", tokens=5, runs=1, engine="native")
    with pytest.raises(BadInput, match="engine 'warp': known are auto, native, transformers"):
        generate(gpt2(), Letters(), "abc", tokens=5, runs=1, engine="warp")


def test_switched_off_kernels_leave_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    assert "no native kernels" in generate(llama(), Letters(), "abc", tokens=3, runs=1, engine="auto")["engine"]
