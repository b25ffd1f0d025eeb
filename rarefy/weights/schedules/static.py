"""Static: the sparsity a model starts with is the sparsity it keeps."""

from __future__ import annotations

from rarefy.core.records import Phase, TrainRecipe
from rarefy.weights.allocations.erdos_renyi import ERK
from rarefy.weights.criteria.random import RANDOM_PRUNING, Random
from rarefy.weights.schedules.constant import Constant


def _phases(density: float, steps: int) -> tuple[Phase, ...]:
    return (Phase("static", density=Constant(density), criterion=Random()),)


STATIC = TrainRecipe("static", _phases, ERK(), Random(), RANDOM_PRUNING.paper)
