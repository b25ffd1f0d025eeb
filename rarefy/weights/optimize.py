"""Optimize: the sparsest form of a model within a budget of loss, by bisection over density for each recipe.

The dense statistics are collected once and serve every try; each try is undone exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.collect import Stats, collect_all
from rarefy.core.errors import BadInput
from rarefy.core.journal import Journal
from rarefy.core.records import Recipe
from rarefy.core.search import Bisect, trial
from rarefy.weights.checkpoint import digest
from rarefy.weights.prune import dense_statistics, describe, prune, trial_key
from rarefy.weights.sites import find_sites

Evaluate = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Loss:
    """The relative rise in perplexity of a model over the dense one, with its paired interval."""

    value: float
    interval: tuple[float, float]


def relative_loss(dense_nll: Tensor, nll: Tensor, *, block: int = 511, draws: int = 2000, seed: int = 0) -> Loss:
    """How much perplexity rose, relative to the dense model, on the same tokens.

    ``loss = exp(mean(nll - dense_nll)) - 1``; the 95% interval resamples blocks of `block` neighbouring tokens, the
    pair kept together.

    Args:
        dense_nll, nll: float [N], nats a token, of the same N tokens.

    Raises:
        BadInput: different lengths, or NaN.

    >>> relative_loss(torch.zeros(4), torch.zeros(4), block=1).interval
    (0.0, 0.0)
    """
    if dense_nll.shape != nll.shape or not torch.isfinite(nll).all():
        raise BadInput(f"{tuple(nll.shape)} token losses against {tuple(dense_nll.shape)} dense ones", "both must be finite and of the same tokens")
    rise = (nll - dense_nll).double()
    whole = rise[: max(1, len(rise) // block) * block].split(block) if len(rise) >= block else [rise]
    sums, sizes = torch.stack([b.sum() for b in whole]), torch.tensor([float(len(b)) for b in whole], dtype=torch.float64)
    pick = torch.randint(len(whole), (draws, len(whole)), generator=torch.Generator().manual_seed(seed))
    means = sums[pick].sum(1) / sizes[pick].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).expm1().tolist()
    return Loss(float(rise.mean().expm1()), (low, high))


def optimize(
    model: nn.Module,
    batches: Sequence[Any],
    recipes: Sequence[Recipe],
    evaluate: Evaluate,
    *,
    max_loss: float,
    tolerance: float = 0.05,
    lowest: float = 0.2,
    seed: int = 0,
    journal: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Prune a model in place to the lowest density whose loss stays within `max_loss`.

    A try is good where the point estimate of the relative loss is at most `max_loss`; its interval is reported
    beside it. Recipes (which differ in criterion, allocation, solver or pattern) are searched one after the other,
    each only below the best density so far.

    Args:
        model: pruned in place at the end; exactly as before if nothing fits.
        batches: calibration batches, see `prune`.
        recipes: candidates, each with a pattern that reaches any density.
        evaluate: model -> nats per held-out token, float [N], the same tokens each time.
        max_loss: relative rise in perplexity, 0.05 for 5%.
        tolerance: how finely density is searched. lowest: the smallest density that is tried.
        journal: a JSON file of finished tries; a run that was killed does not repeat them.

    Returns:
        ({max_loss, loss, interval, chosen, tried}, the prune record or None where the dense model is best).

    Raises:
        BadInput: no recipes, or a negative budget.
    """
    if not recipes or max_loss < 0:
        raise BadInput(f"max_loss {max_loss} over {len(recipes)} recipes", "a budget is not negative, and there must be a recipe to try")
    model.eval()
    dense_nll = evaluate(model)
    stats = collect_all(model, batches, find_sites(model), dense_statistics(recipes), progress=progress)
    tries = _Tries(model, evaluate, dense_nll, stats, max_loss, seed, Journal(journal, digest(batches, dense_nll)) if journal else None, progress)
    best: tuple[float, Recipe | None] = (1.0, None)
    for recipe in recipes:
        if best[0] - lowest <= tolerance:
            break
        density = Bisect(lowest, best[0], tolerance)(partial(tries.good, recipe))
        if density < best[0]:
            best = (density, recipe)
    density, chosen = best
    if chosen is None:
        zero = {"max_loss": max_loss, "loss": 0.0, "interval": [0.0, 0.0], "chosen": None, "tried": tries.rows}
        return zero, None
    row = next(r for r in tries.rows if (r["recipe"], r["allocation"], r["density"]) == (chosen.name, describe(chosen.allocation), density))
    record = prune(model, batches, chosen, density=density, statistics=stats, seed=seed)
    found = {"recipe": chosen.name, "density": density, "pattern": record["pattern"], "allocation": record["allocation"]}
    return {"max_loss": max_loss, "loss": row["loss"], "interval": row["interval"], "chosen": found, "tried": tries.rows}, record


@dataclass
class _Tries:
    model: nn.Module
    evaluate: Evaluate
    dense_nll: Tensor
    stats: Stats
    max_loss: float
    seed: int
    journal: Journal | None
    progress: Any

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def good(self, recipe: Recipe, density: float) -> bool:
        key = trial_key(recipe, density, self.seed)
        known = self.journal.get(key) if self.journal else None
        row = known or self._measure(recipe, density)
        if known is None and self.journal:
            self.journal.put(key, row)
        row = {**row, "ok": row["loss"] <= self.max_loss, "reused": known is not None}
        self.rows.append(row)
        return bool(row["ok"])

    def _measure(self, recipe: Recipe, density: float) -> dict[str, Any]:
        if self.progress:
            self.progress(0, 1, f"try {recipe.name} at {density:.3g}")
        with trial(self.model):
            prune(self.model, [], recipe, density=density, statistics=self.stats, errors=False, seed=self.seed, progress=self.progress)
            loss = relative_loss(self.dense_nll, self.evaluate(self.model))
        return {"recipe": recipe.name, "allocation": describe(recipe.allocation), "density": density, "loss": loss.value, "interval": list(loss.interval)}
