"""Timing that can be trusted: medians of rounds with their spread, and a word when the machine is busy."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of the rounds, the fastest and the slowest."""

    median: float
    fastest: float
    slowest: float


def rounds(work: Callable[[], object], count: int = 3) -> Timing:
    """Run `work` count times.

    >>> rounds(lambda: None).fastest >= 0
    True
    """
    took = []
    for _ in range(count):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return Timing(statistics.median(took), min(took), max(took))


def ratio(peer: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times as fast ours is, of seconds that were taken round by round: the median over the rounds, the lowest and the highest.

    >>> ratio([3.0, 3.0, 3.0], [1.0, 2.0, 4.0])
    {'ratio': 1.5, 'ratio_min': 0.75, 'ratio_max': 3.0}
    """
    found = [p / o for p, o in zip(peer, ours, strict=True)]
    return {"ratio": statistics.median(found), "ratio_min": min(found), "ratio_max": max(found)}


def busy(threshold: float = 0.5) -> str | None:
    """A warning where other work holds the machine, None where it is quiet: the load average of the last minute, per core."""
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    return f"the machine is busy (load {load:.2f} a core): figures are slower and less steady than on a quiet one" if load > threshold else None
