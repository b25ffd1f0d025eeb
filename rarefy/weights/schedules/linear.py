"""Linear: a value on a straight line, then at rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rarefy.core.records import Progress
from rarefy.core.roles import Schedule


@dataclass(frozen=True)
class Linear(Schedule):
    """``v(t) = start + (final - start) t / steps`` for t < steps of the phase, exactly final from there on.

    >>> [Linear(1.0, 0.0, 4)(Progress(phase_step=t)) for t in (0, 1, 4, 9)]
    [1.0, 0.75, 0.0, 0.0]
    """

    start: float
    final: float
    steps: int
    name = "linear"

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(1.0, 0.1, 100),)

    def __call__(self, progress: Progress) -> float:
        t = progress.phase_step
        return self.final if t >= self.steps else self.start + (self.final - self.start) * t / self.steps
