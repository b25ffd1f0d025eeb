"""Cosine: a value that decays to zero along half a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rarefy.core.records import Progress
from rarefy.core.roles import Schedule


@dataclass(frozen=True)
class Cosine(Schedule):
    """``f(t) = start / 2 * (1 + cos(t pi / end))`` for t < end steps of the phase, exactly 0 from there on.

    Source: Evci et al., Rigging the Lottery, arXiv 1911.11134, section 3 (update schedule).

    >>> Cosine(0.5, 10)(Progress(phase_step=0)), Cosine(0.5, 10)(Progress(phase_step=10))
    (0.5, 0.0)
    """

    start: float
    end: int
    name = "cosine"

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(0.3, 100),)

    def __call__(self, progress: Progress) -> float:
        t = progress.phase_step
        return 0.0 if t >= self.end else self.start / 2 * (1 + math.cos(t * math.pi / self.end))
