"""Shifted: another schedule, as it is so many steps later."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rarefy.core.records import Progress
from rarefy.core.roles import Schedule
from rarefy.weights.schedules.cosine import Cosine


@dataclass(frozen=True)
class Shifted(Schedule):
    """A schedule taken up at a later point: what a phase that repeats the end of another follows.

    ``v(t) = schedule(t + steps)``, t the step of the phase

    >>> Shifted(Cosine(1.0, 10), 5)(Progress(phase_step=0)) == Cosine(1.0, 10)(Progress(phase_step=5))
    True
    """

    schedule: Schedule
    steps: int
    name = "shifted"

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(Cosine(1.0, 10), 3),)

    def __call__(self, progress: Progress) -> Any:
        return self.schedule(replace(progress, phase_step=progress.phase_step + self.steps))
