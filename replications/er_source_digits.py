"""Iterative magnitude pruning of digits to 5%, from a dense network and inside random sources of 50% and 8%: accuracies at two widths, four seeds.

What is claimed of means over seeds: a half is within one point of dense. Of every seed: 8% is below dense and below a half.
"""

from __future__ import annotations

import statistics
from typing import Any

from rarefy.tasks.digits import Digits
from rarefy.weights.rewind import IMP
from rarefy.weights.source_net import SourceNet
from rarefy.weights.train import train

SLUG = "er-source-nets"
NAME = "digits pruned to 5% from a random half: within 1 point of dense at two widths, mean of 4 seeds, where 8% is worse in every one"
SOURCES = (
    "rarefy/tasks/digits.py",
    "rarefy/weights/actions.py",
    "rarefy/weights/rewind.py",
    "rarefy/weights/source_net.py",
    "rarefy/weights/sparsifier.py",
)
WIDTHS, SOURCE_DENSITIES, SEEDS, STEPS, DENSITY = (64, 128), (1.0, 0.5, 0.08), (0, 1, 2, 3), 1600, 0.05


def accuracy(width: int, source: float, seed: int) -> float:
    within = SourceNet(source) if source < 1 else None
    found: float = train(Digits(width=width), IMP, density=DENSITY, steps=STEPS, seed=seed, within=within)["metric"]["accuracy"]
    return found


def run() -> tuple[dict[str, Any], bool]:
    """(accuracies by width and source density, whether a half is within a point of dense and 8% below both in every seed)."""
    found = {width: {source: [accuracy(width, source, seed) for seed in SEEDS] for source in SOURCE_DENSITIES} for width in WIDTHS}
    mean = {width: {source: statistics.mean(values) for source, values in by.items()} for width, by in found.items()}
    worse = all(low < min(whole, half) for by in found.values() for whole, half, low in zip(*by.values(), strict=True))
    holds = worse and all(by[1.0] - by[0.5] <= 0.01 for by in mean.values())
    return {"accuracy": found, "mean": mean, "steps": STEPS, "seeds": list(SEEDS)}, holds
