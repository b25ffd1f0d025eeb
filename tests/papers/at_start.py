"""What the methods share that prune before training: their masks on the digits, and the statistics they stand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rarefy.core.collect import collect_all
from rarefy.core.records import Site, TrainRecipe
from rarefy.tasks.digits import Digits
from rarefy.weights.sites import find_sites
from rarefy.weights.sparsifier import Sparsifier
from rarefy.weights.statistics import statistic

DIGITS = Digits()


def batches(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [DIGITS.batch(0, step) for step in range(count)]


def begun(recipe: TrainRecipe, density: float, model: nn.Module, given: Sequence[Any] | None = None) -> Sparsifier:
    """A sparsifier that has chosen its masks, before any step."""
    phases = tuple(replace(phase, allocation=phase.allocation or recipe.allocation) for phase in recipe.phases(density, 100))
    return Sparsifier(model, phases, total=100, batches=batches() if given is None else given, batch_loss=DIGITS.loss)


def measured(name: str, model: nn.Module, given: Sequence[Any], loss: Any = DIGITS.loss) -> dict[str, Tensor]:
    """The statistic of that name of every linear or convolutional weight."""
    sites: list[Site] = find_sites(model, include=("*",))
    return collect_all(model, given, sites, [statistic(name)], loss=loss)[name]
