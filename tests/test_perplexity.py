"""Perplexity equals a plain transformers loop, on Llama and GPT-2, and refuses what would be wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rarefy.core.errors import BadInput, Refused
from rarefy.probes.perplexity import bootstrap, perplexity, spans, token_nll

transformers = pytest.importorskip("transformers")


def tiny_llama() -> nn.Module:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.5
    )
    return transformers.LlamaForCausalLM(config).eval()


def tiny_gpt2() -> nn.Module:
    torch.manual_seed(2)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)).eval()


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def plain(model: Any, ids: Tensor, window: int, stride: int, bos: int | None) -> float:
    """The loop of the transformers documentation: labels, -100 where a token is context, loss weighted by its tokens."""
    total, scored, previous, room = 0.0, 0, 0, window - (bos is not None)
    for begin in range(0, ids.numel(), stride):
        end = min(begin + room, ids.numel())
        piece, labels = ids[begin:end].clone(), ids[begin:end].clone()
        labels[: previous - begin] = -100
        if bos is not None:
            piece, labels = torch.cat([torch.tensor([bos]), piece]), torch.cat([torch.tensor([-100]), labels])
        count = int((labels[1:] != -100).sum())
        if count:
            with torch.no_grad():
                total += float(model(input_ids=piece[None], labels=labels[None]).loss) * count
        scored, previous = scored + count, end
        if end == ids.numel():
            break
    return math.exp(total / scored)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("window", "stride", "bos"), [(16, None, 1), (16, None, None), (16, 5, 1), (16, 7, None), (64, None, 1)])
def test_equals_a_plain_transformers_loop(name: str, window: int, stride: int | None, bos: int | None) -> None:
    model, ids = MODELS[name](), torch.randint(61, (103,))
    record = perplexity(model, ids, tokens=103, window=window, stride=stride, bos=bos)
    assert record["perplexity"] == pytest.approx(plain(model, ids, window, record["stride"], bos), rel=1e-4)
    assert record["perplexity"] > 65  # the model is not uniform, so the agreement above is not empty


@given(count=st.integers(0, 200), window=st.integers(2, 40), stride=st.integers(1, 40), bos=st.booleans())
def test_spans_score_each_token_once(count: int, window: int, stride: int, bos: bool) -> None:
    stride = min(stride, window - bos)
    cut = spans(count, window, stride, bos)
    scored = [t for s in cut for t in range(s.score, s.end)]
    assert scored == sorted(set(scored))
    assert all(s.end - s.begin + bos <= window for s in cut)
    if bos or stride < window:
        assert scored == list(range(0 if bos else 1, count))


def test_token_nll_has_one_figure_a_token() -> None:
    model, ids = tiny_llama(), torch.randint(61, (40,))
    nll = token_nll(model, ids, window=16, bos=1)
    assert nll.shape == (40,)
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[1, int(ids[0])]])).logits[0, 0].log_softmax(-1)[ids[0]]
    assert float(nll[0]) == pytest.approx(-float(first), rel=1e-5)
    assert perplexity(model, ids, tokens=40, window=16, bos=1)["nll"] == pytest.approx(float(nll.mean()), rel=1e-6)


def test_record_holds_the_protocol_and_an_interval_around_the_figure() -> None:
    record = perplexity(tiny_llama(), torch.randint(61, (160,)), tokens=160, window=17, bos=1)
    assert {k: record[k] for k in ("tokens", "windows", "window", "stride", "bos", "dtype")} == {
        "tokens": 160,
        "windows": 10,
        "window": 17,
        "stride": 16,
        "bos": 1,
        "dtype": "float32",
    }
    assert record["interval"][0] < record["perplexity"] < record["interval"][1]


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draws = torch.randn(200, 40, generator=torch.Generator().manual_seed(3))
    intervals = [bootstrap(row, torch.ones(40), resamples=300) for row in draws]
    covered = sum(low < 0 < high for low, high in intervals) / 200
    assert 0.88 <= covered <= 0.99


def test_one_window_has_no_interval() -> None:
    assert perplexity(tiny_llama(), torch.randint(61, (10,)), tokens=10, window=16, bos=1)["interval"] is None


def test_mode_of_the_model_is_restored() -> None:
    model = tiny_gpt2().train()
    once, again = (token_nll(model, torch.arange(20), window=10, bos=1) for _ in range(2))
    assert model.training
    assert torch.equal(once, again)  # dropout was off


def test_nan_weights_are_named_not_averaged() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(BadInput, match="not finite"):
        perplexity(model, torch.randint(61, (40,)), tokens=40, window=16, bos=1)


@pytest.mark.parametrize(
    ("ids", "asked", "says"),
    [
        (torch.arange(20), {}, "16384 were asked"),
        (torch.arange(20), {"tokens": 20, "window": 65}, "64 positions"),
        (torch.arange(20), {"tokens": 20, "window": 1}, "two positions"),
        (torch.arange(20), {"tokens": 20, "window": 8, "stride": 9}, "stride"),
        (torch.arange(20.0), {"tokens": 20}, "token ids"),
        (torch.arange(20)[None], {"tokens": 20}, "token ids"),
    ],
)
def test_refuses(ids: Tensor, asked: dict[str, int], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        perplexity(tiny_llama(), ids, **asked)


def test_a_model_that_attends_in_both_directions_is_refused() -> None:
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = torch.arange(20)
    with pytest.raises(Refused, match="both directions"):
        token_nll(transformers.BertLMHeadModel(transformers.BertConfig(**sizes)), ids, 10)
    assert token_nll(transformers.BertLMHeadModel(transformers.BertConfig(**sizes, is_decoder=True)), ids, 10).numel() == 18
