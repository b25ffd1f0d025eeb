"""The race of whole models: figures that add up, perplexity by the engine's own arithmetic, refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

from rarefy.core.errors import BadInput
from rarefy.hub.load import Loaded
from rarefy.kernels.library import native
from rarefy.probes.decoding import WINDOW, Runner, race

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(native() is None, reason="the native kernels were not built here")


def llama() -> Loaded:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=512, initializer_range=0.3)).eval()
    return Loaded(model, None, Path(), "tiny")


def test_a_race_of_one_model_in_two_engines() -> None:
    loaded = llama()
    runners = [Runner.of("plain", Loaded(copy.deepcopy(loaded.model), None, Path(), "tiny"), "transformers"), Runner.of("ours", loaded)]
    heldout = torch.randint(1, 61, (2 * WINDOW + 7,))
    record = race(runners, torch.randint(1, 61, (1, 5)), heldout, tokens=3, rounds=5)
    plain, ours = record["rows"]
    assert plain["ratio"] == 1 and plain["ratio_spread"] == [1, 1] and ours["peer"] == "plain"
    assert ours["ratio_spread"][0] <= ours["ratio"] <= ours["ratio_spread"][1]
    assert ours["tokens_per_s"] == pytest.approx(1e3 / ours["ms_per_token"])
    with torch.no_grad():
        nll = [torch.nn.functional.cross_entropy(loaded.model(w[None], use_cache=False).logits[0, :-1], w[1:], reduction="sum") for w in heldout.split(WINDOW)]
    want = math.exp(float(torch.stack(nll).sum()) / (len(heldout) - 3))
    assert plain["perplexity"] == pytest.approx(want, rel=1e-4) and ours["perplexity"] == pytest.approx(want, rel=1e-4)
    assert ours["interval"][0] < want < ours["interval"][1] and ours["model_bytes"] == plain["model_bytes"]


def test_a_race_has_two_models_and_five_rounds() -> None:
    runner = Runner.of("ours", llama())
    with pytest.raises(BadInput, match="1 models in 7 rounds"):
        race([runner], torch.ones(1, 2, dtype=torch.long), torch.ones(9, dtype=torch.long))
    with pytest.raises(BadInput, match="2 models in 3 rounds"):
        race([runner, runner], torch.ones(1, 2, dtype=torch.long), torch.ones(9, dtype=torch.long), rounds=3)
