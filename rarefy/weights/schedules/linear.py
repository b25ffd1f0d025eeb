"""Linear: a value that decays to zero along a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rarefy.core.records import Progress
from rarefy.core.roles import Schedule


@dataclass(frozen=True)
class Linear(Schedule):
    """``f(t) = start (1 - t / end)`` for t < end steps of the phase, exactly 0 from there on.

    >>> [Linear(1.0, 4)(Progress(phase_step=t)) for t in (0, 1, 4, 9)]
    [1.0, 0.75, 0.0, 0.0]
    """

    start: float
    end: int
    name = "linear"

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(1.0, 100),)

    def __call__(self, progress: Progress) -> float:
        return self.start * max(0.0, 1 - progress.phase_step / self.end)
