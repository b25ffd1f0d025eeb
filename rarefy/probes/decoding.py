"""Whole models decoding against one another: interleaved rounds in one run, each with the perplexity that its own engine gives. Measured only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.hub.engines import use_engine
from rarefy.hub.load import Loaded, parameters_bytes
from rarefy.probes.perplexity import bootstrap
from rarefy.probes.timers import busy

WINDOW = 256  # tokens that are scored from an empty cache


@dataclass(frozen=True)
class Runner:
    """A model with what runs it: `name` in the table; `engine` as `use_engine` describes it."""

    name: str
    loaded: Loaded
    engine: str

    @classmethod
    def of(cls, name: str, loaded: Loaded, engine: str = "native", head: str | None = None) -> Runner:
        return cls(name, loaded, use_engine(loaded.model, engine, head))

    @torch.no_grad()
    def time(self, prompt: Tensor, tokens: int) -> float:
        """Seconds a token of greedy decoding after the prompt [1, T]."""
        out = self.loaded.model(prompt, use_cache=True, logits_to_keep=1)
        following = out.logits[:, -1].argmax(-1, keepdim=True)
        began = time.perf_counter()
        for _ in range(tokens):
            out = self.loaded.model(following, past_key_values=out.past_key_values, use_cache=True)
            following = out.logits[:, -1].argmax(-1, keepdim=True)
        return (time.perf_counter() - began) / tokens

    @torch.no_grad()
    def nll(self, ids: Tensor) -> list[Tensor]:
        """Nats of every token but the first of each window, by the engine's own arithmetic."""
        found = []
        for window in ids.split(WINDOW):
            if len(window) < 2:
                continue
            logits = self.loaded.model(window[None], use_cache=True).logits[0, :-1].double()
            found.append(-logits.log_softmax(-1).gather(1, window[1:, None])[:, 0])
        return found


def race(
    runners: Sequence[Runner], prompt: Tensor, heldout: Tensor, *, tokens: int = 32, rounds: int = 7, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, Any]:
    """Decode greedily with every runner in turn, round by round; the first one is the peer.

    Args:
        prompt: ids int64 [1, T]. heldout: ids int64 [N] that perplexity is taken over, in windows of 256 tokens.
        tokens: decoded a round. rounds: at least 5; a first one warms up and is dropped.

    Returns:
        {rows: [{op: "decode", model, engine, peer, ratio, ratio_spread, ms_per_token, tokens_per_s, perplexity, interval,
        model_bytes, threads, warning}], summary}: `ratio` is the median over the rounds of the peer's time over the model's
        (above 1: the model is faster), `ratio_spread` the lowest and the highest round.

    Raises:
        BadInput: fewer than two runners or five rounds, or runners of other vocabularies.
    """
    if len(runners) < 2 or rounds < 5:
        raise BadInput(f"{len(runners)} models in {rounds} rounds", "a race takes at least two models and five rounds")
    warning = busy()
    perplexities = []
    for number, runner in enumerate(runners):
        if progress:
            progress(number, len(runners) + rounds, f"score {runner.name}")
        perplexities.append(_perplexity(runner.nll(heldout)))
    seconds: list[list[float]] = [[] for _ in runners]
    for number in range(rounds + 1):
        if progress:
            progress(len(runners) + max(number - 1, 0), len(runners) + rounds, f"round {number}")
        for runner, found in zip(runners, seconds, strict=True):
            took = runner.time(prompt, tokens)
            if number:
                found.append(took)
    rows = [_row(runners[0], seconds[0], *each, warning) for each in zip(runners, seconds, perplexities, strict=True)]
    return {"rows": rows, "summary": {"tokens": tokens, "rounds": rounds, "prompt": prompt.shape[1], "scored": len(heldout), "torch": torch.__version__}}


def _perplexity(windows: list[Tensor]) -> tuple[float, list[float] | None]:
    sums, counts = torch.tensor([float(w.sum()) for w in windows]), torch.tensor([float(w.numel()) for w in windows])
    limits = bootstrap(sums, counts, 1000, 0)
    mean = torch.cat(windows).mean()
    return float(mean.exp()), None if limits is None else [float(torch.tensor(x, dtype=torch.float64).exp()) for x in limits]


def _row(peer: Runner, peer_seconds: list[float], runner: Runner, seconds: list[float], scored: tuple[float, list[float] | None], warning: str | None) -> dict[str, Any]:
    ratios = [p / s for p, s in zip(peer_seconds, seconds, strict=True)]
    median = statistics.median(seconds)
    return {
        "op": "decode",
        "model": runner.name,
        "engine": runner.engine,
        "peer": peer.name,
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "ms_per_token": 1e3 * median,
        "tokens_per_s": 1 / median,
        "perplexity": scored[0],
        "interval": scored[1],
        "model_bytes": parameters_bytes(runner.loaded.model),
        "threads": torch.get_num_threads(),
        "warning": warning,
    }
