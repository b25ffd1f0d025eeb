"""Iterative magnitude pruning: train, prune, go back, and again; by the weights of an early step or by its learning rate.

A phase of no steps prunes what training made; the phase after it is entered by going back.
"""

from __future__ import annotations

import math
from typing import Any

from rarefy.core.errors import BadInput
from rarefy.core.records import Paper, Phase, TrainRecipe
from rarefy.weights.actions import Afresh, Remember, Rewind
from rarefy.weights.allocations.global_scores import Global
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.schedules.constant import Constant
from rarefy.weights.schedules.cosine import Cosine
from rarefy.weights.schedules.shifted import Shifted

SHARE = 0.2  # of what is left goes in every round, at most
EARLY = 0.1  # of a round: where training goes back to


def rounds(density: float) -> int:
    """How many prunings reach a density where each takes at most a fifth of what is left.

    >>> rounds(0.8), rounds(0.1), rounds(1.0)
    (1, 11, 0)
    """
    return max(0, math.ceil(math.log(density) / math.log(1 - SHARE) - 1e-9))


def longest(steps: int, trainings: int, early: float) -> int:
    """How long a training may be so that one whole training and `trainings` - 1 from its early step on fit in the steps.

    >>> longest(198, 22, 0.1), longest(180, 22, 0.1)
    (9, 8)
    """
    length = int(steps / (1 + (trainings - 1) * (1 - early)))
    while length and length + (trainings - 1) * (length - int(early * length)) > steps:  # the early step is rounded down
        length -= 1
    return length


def _cycle(density: float, steps: int, back: Any) -> tuple[Phase, ...]:
    """Train once, then prune and retrain from the early step on, `rounds` times; every training has the same length."""
    count = rounds(density)
    length = longest(steps, 1 + count, EARLY)
    early = int(EARLY * length)
    if length - early < 1:
        raise BadInput(f"{steps} steps", f"{count} rounds of pruning to density {density} need at least one step each", f"ask for at least {2 * (count + 1)} steps")
    rate = Cosine(1.0, length)
    again = Shifted(rate, early)
    first = (Phase("start", until=early, rate=rate), Phase("dense", until=length - early, rate=again, enter=(Remember(),)))
    return first + tuple(
        phase
        for k in range(1, count + 1)
        for phase in (
            Phase("prune", until=0, density=Constant(density ** (k / count)), criterion=Magnitude(), allocation=Global()),
            Phase("retrain", until=length - early, rate=again, enter=(back,)),
        )
    )


def _weights(density: float, steps: int) -> tuple[Phase, ...]:
    return _cycle(density, steps, Rewind())


def _rate(density: float, steps: int) -> tuple[Phase, ...]:
    return _cycle(density, steps, Afresh())


_DEVIATIONS = (
    "the rounds share the steps asked for, and take equal shares of what is left, at most a fifth, so that the last meets the density exactly",
    "the learning rate falls by half a cosine in place of steps down",
    "training goes back to a tenth of a round, where the papers go back to a number of epochs that they search for",
)

IMP = TrainRecipe(
    "imp",
    _weights,
    Global(),
    Magnitude(),
    Paper("imp", "Linear Mode Connectivity and the Lottery Ticket Hypothesis", "arXiv 1912.05671", _DEVIATIONS),
)
IMP_RATE = TrainRecipe(
    "imp-rate",
    _rate,
    Global(),
    Magnitude(),
    Paper("imp-rate", "Comparing Rewinding and Fine-tuning in Neural Network Pruning", "arXiv 2003.02389", _DEVIATIONS),
)
