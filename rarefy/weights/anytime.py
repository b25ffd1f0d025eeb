"""APP: data arrives in parts, and with every part the network is pruned a bit further, so that it may be used at any time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rarefy.core.errors import BadInput
from rarefy.core.records import Paper, Phase, TrainRecipe
from rarefy.weights.actions import Confine
from rarefy.weights.allocations.global_scores import Global
from rarefy.weights.criteria.gradient_weight import GradientWeight
from rarefy.weights.schedules.constant import Constant
from rarefy.weights.schedules.linear import Linear
from rarefy.weights.triggers.arrival import Arrival

KEPT = 0.8  # of the weights, per level

PAPER = Paper(
    "app-anytime",
    "APP: Anytime Progressive Pruning",
    "arXiv 2204.01640",
    (
        "every state begins with the last weights of the one before; the authors reload the best on validation data",
        "the learning rate falls in a line within every state, in place of two steps down",
        "linear layers are pruned too, not convolutions alone",
        "the current weights are scored and survivors alone are ranked, as the paper says: in the authors' code, as read, the convolutions are scored at fresh values and pruned entries take part",
        "SNIP alone: the authors also have magnitudes, GraSP and chance, and local pruning",
    ),
)


@dataclass(frozen=True)
class Anytime:
    """One phase per state: when a part of the data arrives, prune among survivors by SNIP on that part, and train on.

    ``density_t = 0.8^tau_t,  tau_t = linspace(min(1, tau), tau, states)[t],  tau = log density / log 0.8``: levels are absolute, masks nested

    The first state begins with the training; every other one with an event "data" (`rarefy.weights.sparsifier.Sparsifier.boundary`).

    Raises:
        BadInput: no state, or a density outside (0, 1].

    Source: Misra et al., APP, arXiv 2204.01640, and the authors' code: tau = 4.5, so that 37% are kept in the end.

    >>> [round(p.density.value, 3) for p in Anytime(3)(0.8**4.5, 90)]
    [0.8, 0.541, 0.366]
    """

    states: int = 6

    def __call__(self, density: float, steps: int) -> tuple[Phase, ...]:
        if self.states < 1 or not 0 < density <= 1:
            raise BadInput(f"{self.states} states to density {density}", "there is a state or more, and a density lies in (0, 1]")
        rate = Linear(1.0, 0.01, max(1, steps // self.states))
        return tuple(
            Phase(
                f"state {t + 1}",
                until=None if t + 1 == self.states else Arrival(),
                density=Constant(level),
                criterion=GradientWeight(),
                allocation=Global(),
                enter=(Confine(),) if t else (),
                rate=rate,
            )
            for t, level in enumerate(self.densities(density))
        )

    def densities(self, density: float) -> list[float]:
        """The density of every state; the last is the one asked for, exactly."""
        tau = math.log(density) / math.log(KEPT)
        first = min(1.0, tau)
        levels = [first + (tau - first) * t / (self.states - 1) for t in range(self.states - 1)]
        return [*(KEPT**level for level in levels), density]


APP = TrainRecipe("app-anytime", Anytime(), Global(), GradientWeight(), PAPER)
