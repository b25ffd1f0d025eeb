"""Cubic: prune fast while there is redundancy, slowly towards the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rarefy.core.records import Paper, Phase, Progress, TrainRecipe
from rarefy.core.roles import Schedule
from rarefy.weights.allocations.uniform import Uniform
from rarefy.weights.criteria.magnitude import Magnitude

PAPER = Paper("gradual-magnitude", "To prune, or not to prune: exploring the efficacy of pruning for model compression", "arXiv 1710.01878")


@dataclass(frozen=True)
class Cubic(Schedule):
    """The density kept along gradual pruning; it changes only at the updates t0, t0 + dt, ..., t0 + n dt.

    ``s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3``, returned as the density 1 - s_t; the ends are exact.

    Fields: final and initial densities, begin t0 and every dt in steps of the phase, updates n.
    Source: Zhu and Gupta, arXiv 1710.01878, eq. 1.

    >>> c = Cubic(final=0.25, begin=0, every=10, updates=2)
    >>> [c(Progress(phase_step=t)) for t in (0, 9, 10, 20, 99)]
    [1.0, 1.0, 0.34375, 0.25, 0.25]
    """

    final: float
    begin: int = 0
    every: int = 100
    updates: int = 10
    initial: float = 1.0
    name = "cubic"
    paper = PAPER

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(0.1),)

    def __call__(self, progress: Progress) -> float:
        done = (progress.phase_step - self.begin) // self.every
        if done <= 0:
            return self.initial
        if done >= self.updates:
            return self.final
        return self.final + (self.initial - self.final) * (1 - done / self.updates) ** 3


def _phases(density: float, steps: int) -> tuple[Phase, ...]:
    every = max(1, steps // 40)
    schedule = Cubic(density, begin=steps // 8, every=every, updates=max(1, steps // (2 * every)))
    return (Phase("gradual", density=schedule, criterion=Magnitude(), enforce=False),)


GRADUAL_MAGNITUDE = TrainRecipe("gradual-magnitude", _phases, Uniform(), Magnitude(), PAPER)
