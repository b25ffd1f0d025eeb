"""Restarted: gradual pruning where every step of the density starts the learning rate anew."""

from __future__ import annotations

from rarefy.core.errors import BadInput
from rarefy.core.records import Paper, Phase, Progress, TrainRecipe
from rarefy.weights.allocations.global_scores import Global
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.schedules.constant import Constant
from rarefy.weights.schedules.cubic import Cubic
from rarefy.weights.schedules.linear import Linear

UPDATES = 8  # prunings
FIRST = 0.3  # the density of the first pruning, where the last is below it


def densities(density: float) -> tuple[float, ...]:
    """What the prunings keep, in order: a large first step, then the cubic.

    >>> [round(d, 3) for d in densities(0.02)]
    [0.3, 0.196, 0.122, 0.072, 0.042, 0.027, 0.021, 0.02]
    """
    cubic = Cubic(density, begin=0, every=1, updates=UPDATES - 1, initial=max(density, FIRST))
    return tuple(cubic(Progress(phase_step=k)) for k in range(UPDATES))


def _phases(density: float, steps: int) -> tuple[Phase, ...]:
    """Ten equal parts: one dense, one after each pruning but the last, and two after that; the rate falls along a line within each."""
    length = steps // (UPDATES + 2)
    if length < 1:
        raise BadInput(f"{steps} steps", f"{UPDATES} prunings need a step before and after each", f"ask for at least {UPDATES + 2} steps")
    lengths = (*[length] * UPDATES, steps - UPDATES * length)
    return tuple(
        Phase("restart", until=until, density=Constant(kept), criterion=Magnitude(), allocation=Global(), rate=Linear(1.0, 0.0, until))
        for kept, until in zip((1.0, *densities(density)), lengths, strict=True)
    )


RESTARTED = TrainRecipe(
    "gradual-restarts",
    _phases,
    Global(),
    Magnitude(),
    Paper(
        "sparse-optimization-recipes",
        "Accurate Neural Network Pruning Requires Rethinking Sparse Optimization",
        "arXiv 2308.02060",
        (
            "beyond its abstract the paper was not at hand: restarts, the large first step and the measures of under-training rest on memory, so the row stays partial",
            "its recipe for vision is `ac-dc` trained for longer: our phases and rate stretch with the steps; label smoothing and image sizes are the task's own",
            "trained from scratch, without distillation from a dense teacher",
            "the prunings share the steps equally, where the paper chooses an interval for every target",
        ),
    ),
)
