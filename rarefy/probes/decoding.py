"""Whole models decoding against one another: interleaved rounds in one run, each with the perplexity that its own engine gives. Measured only."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.probes.perplexity import bootstrap
from rarefy.probes.racers.racer import Racer
from rarefy.probes.timers import busy, ratio

WINDOW = 256  # tokens that are scored from an empty cache, BOS included


def race(
    racers: Sequence[Racer], prompt: Tensor, heldout: Tensor, *, bos: int | None = None, tokens: int = 32, rounds: int = 7, progress: Callable[[int, int, str], None] | None = None
) -> list[dict[str, Any]]:
    """Decode greedily with every racer in turn, round by round; the first one is the peer.

    Args:
        prompt: ids int64 [1, T]. heldout: ids int64 [N] that perplexity is taken over, in windows of 256 tokens that begin with `bos`.
        tokens: decoded a round. rounds: at least 5; a first one warms up and is dropped.

    Returns:
        [{op: "decode", model, engine, precision, density, peer, claim, ratio, ratio_min, ratio_max, ms_per_token, tokens_per_s,
        perplexity, interval, scored, model_bytes, dominated_by, tokens, rounds, threads, torch, warning}]: `ratio` is the median over the
        rounds of the peer's time over the model's (above 1: the model is faster), ratio_min and ratio_max the lowest and the highest
        round; `dominated_by` names a model that is no worse in perplexity, speed and bytes and better in one. `claim` says what a ratio means: "sparsity"
        where both run in one engine at one precision, so that what they leave out is all that differs, else "engine".

    Raises:
        BadInput: fewer than two racers or five rounds, or models of other vocabularies.
    """
    if len(racers) < 2 or rounds < 5:
        raise BadInput(f"{len(racers)} models in {rounds} rounds", "a race takes at least two models and five rounds")
    if len({racer.vocabulary for racer in racers}) > 1:
        raise BadInput(", ".join(f"{racer.name} with {racer.vocabulary} tokens" for racer in racers), "models that race score the same token ids")
    windows = cut(heldout, bos)
    warning, steps = busy(), len(racers) + rounds
    note = progress or (lambda done, all, what: None)
    perplexities = []
    for number, racer in enumerate(racers):
        note(number, steps, f"score {racer.name}")
        perplexities.append(_perplexity(racer.nll(windows)))
    seconds = rounds_of(racers, prompt, tokens, rounds, lambda done, all, what: note(len(racers) + done, steps, what))
    rows = [_row(racers[0], seconds[0], *each, warning) for each in zip(racers, seconds, perplexities, strict=True)]
    common = {"scored": sum(len(window) - 1 for window in windows), "tokens": tokens, "rounds": rounds, "torch": torch.__version__}
    return [{**row, **common, "dominated_by": next((other["model"] for other in rows if _dominates(other, row)), None)} for row in rows]


def rounds_of(racers: Sequence[Racer], prompt: Tensor, tokens: int, rounds: int, progress: Callable[[int, int, str], None]) -> list[list[float]]:
    """Seconds a token of every racer, round by round: each round times each racer once, in turn; a first round warms up and is dropped."""
    seconds: list[list[float]] = [[] for _ in racers]
    for number in range(rounds + 1):
        progress(max(number - 1, 0), rounds, f"round {number}")
        for racer, found in zip(racers, seconds, strict=True):
            took = racer.time(prompt, tokens)
            if number:
                found.append(took)
    return seconds


def cut(ids: Tensor, bos: int | None = None, window: int = WINDOW) -> list[Tensor]:
    """Windows of at most `window` tokens, each beginning with BOS where there is one; none of a single token.

    >>> [window.tolist() for window in cut(torch.arange(2), bos=9)]
    [[9, 0, 1]]
    """
    head = ids.new_tensor([] if bos is None else [bos])
    found = [torch.cat([head, part]) for part in ids.split(window - len(head))]
    return [window for window in found if len(window) > 1]


def _perplexity(windows: list[Tensor]) -> tuple[float, list[float] | None]:
    sums, counts = torch.tensor([float(w.sum()) for w in windows]), torch.tensor([float(w.numel()) for w in windows])
    limits = bootstrap(sums, counts, 1000, 0)
    mean = torch.cat(windows).mean()
    return float(mean.exp()), None if limits is None else [float(torch.tensor(x, dtype=torch.float64).exp()) for x in limits]


def _row(peer: Racer, peer_seconds: list[float], racer: Racer, seconds: list[float], scored: tuple[float, list[float] | None], warning: str | None) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "op": "decode",
        "model": racer.name,
        "engine": racer.engine,
        "precision": racer.precision,
        "density": racer.density,
        "peer": peer.name,
        "claim": "sparsity" if (racer.engine, racer.precision) == (peer.engine, peer.precision) else "engine",
        **ratio(peer_seconds, seconds),
        "ms_per_token": 1e3 * median,
        "tokens_per_s": 1 / median,
        "perplexity": scored[0],
        "interval": scored[1],
        "model_bytes": racer.model_bytes,
        "threads": torch.get_num_threads(),
        "warning": warning,
    }


def _dominates(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """No worse in perplexity, time and bytes, and better in one."""
    pairs = [(a[key], b[key]) for key in ("perplexity", "ms_per_token", "model_bytes")]
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)
