"""Drops: a value that falls by a factor at given fractions of what is left of the training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rarefy.core.records import Progress
from rarefy.core.roles import Schedule


@dataclass(frozen=True)
class Drops(Schedule):
    """``f(t) = factor^(how many of `at` are <= t / n)``, t the step of the phase, n how many steps the last phase has.

    >>> [round(Drops()(Progress(step=20 + t, total=100, phase_step=t)), 4) for t in (0, 39, 40, 60)]
    [1.0, 1.0, 0.1, 0.01]
    """

    at: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1
    name = "drops"

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(),)

    def __call__(self, progress: Progress) -> float:
        length = progress.total - (progress.step - progress.phase_step)
        return float(self.factor ** sum(progress.phase_step >= fraction * length for fraction in self.at))
