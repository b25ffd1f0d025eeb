"""What this machine can do at best: measured, to hold kernels against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

READ = 2**28  # bytes: more than most caches hold
COLUMNS, SIDE = 8192, 1536


@dataclass(frozen=True)
class Roofline:
    """Bytes a second that are read from memory, multiply-adds a second in float32; with the threads of now."""

    bytes_per_s: float
    macs_per_s: float

    def share(self, moved: int, macs: int, seconds: float) -> float:
        """The least time that so many bytes and multiply-adds take, over the time they took.

        >>> Roofline(100.0, 1000.0).share(50, 100, 1.0)
        0.5
        """
        return max(moved / self.bytes_per_s, macs / self.macs_per_s) / seconds


def roofline(threads: int | None = None) -> Roofline:
    """Measure once a process and thread count: the best of five sums over 256 MiB and of five products of as large a matrix with a vector, and of five products of 1536 x 1536 matrices."""
    return _measured(threads or torch.get_num_threads())


@cache
def _measured(threads: int) -> Roofline:
    words, a = torch.ones(READ // 4 // COLUMNS, COLUMNS), torch.ones(SIDE, SIDE)
    return Roofline(READ / min(_best(words.sum), _best(lambda: words @ words[0])), SIDE**3 / _best(lambda: a @ a))


def _best(work: Callable[[], object]) -> float:
    took = []
    for _ in range(6):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took[1:])
