"""Compare recipes on one model, one calibration text and one held-out text: the same tokens for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from rarefy.core.collect import Stats
from rarefy.core.journal import Journal
from rarefy.core.records import Recipe
from rarefy.core.search import trial
from rarefy.weights.optimize import relative_loss
from rarefy.weights.prune import prune, trial_key


def compare(
    model: nn.Module,
    recipes: Sequence[tuple[Recipe, float]],
    evaluate: Callable[[nn.Module], Tensor],
    *,
    statistics: Stats,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
    book: Journal | None = None,
) -> dict[str, Any]:
    """Prune the model by each (recipe, density), measure, and undo exactly.

    Args:
        evaluate: model -> nats per held-out token [N].
        statistics: dense statistics for every recipe (`collect_all`).
        book: finished rows by key, so that a second run repeats nothing.

    Returns:
        {rows: [{method, pattern, density, seed, metric, value, relative, interval, bytes, bitmask_bytes, error}], summary};
        `value` is perplexity, `relative` its rise over dense with its paired 95% interval, `bytes` dense with zeros in
        the model's dtype, `bitmask_bytes` modelled: one bit a weight and the kept values.
    """
    dense = evaluate(model)
    size = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    head = {"method": "dense", "pattern": "", "density": 1.0, "seed": seed, "metric": "perplexity", "value": float(dense.double().mean().exp())}
    rows: list[dict[str, Any]] = [{**head, "relative": 0.0, "interval": [0.0, 0.0], "bytes": size, "bitmask_bytes": size, "error": 0.0}]
    for number, (recipe, density) in enumerate(recipes):
        key = trial_key(recipe, density, seed)
        known = book.get(key) if book else None
        if progress:
            progress(number, len(recipes), f"{recipe.name} at {density:g}")
        row = known or _row(model, recipe, density, evaluate, dense, statistics, size, seed)
        if known is None and book:
            book.put(key, row)
        rows.append({**row, "reused": known is not None})
    best = min(rows[1:], key=lambda r: r["value"], default=rows[0])
    return {"rows": rows, "summary": {"tokens": int(dense.numel()), "best": best["method"], "best_value": best["value"], "dense_value": rows[0]["value"]}}


def _row(model: nn.Module, recipe: Recipe, density: float, evaluate: Any, dense: Tensor, statistics: Stats, size: int, seed: int) -> dict[str, Any]:
    with trial(model):
        record = prune(model, [], recipe, density=density, statistics=statistics, seed=seed)
        nll = evaluate(model)
        width = next(model.parameters()).element_size()
    loss = relative_loss(dense, nll)
    total = sum(round(s["kept"] / s["density"]) for s in record["sites"] if s["density"])
    kept = sum(s["kept"] for s in record["sites"])
    return {
        "method": recipe.name,
        "pattern": record["pattern"],
        "density": record["density"],
        "seed": seed,
        "metric": "perplexity",
        "value": float(nll.double().mean().exp()),
        "relative": loss.value,
        "interval": list(loss.interval),
        "bytes": size,
        "bitmask_bytes": size - (total - kept) * width + total // 8,
        "error": sum(s["error"] for s in record["sites"]) / len(record["sites"]),
    }
