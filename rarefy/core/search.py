"""Search until a metric is met, each try inside an exact undo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@contextmanager
def trial(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model's parameters and buffers may be changed in place; afterwards every bit is as before.

    Raises what the body raises, after the undo.

    >>> layer = nn.Linear(1, 1); before = layer.weight.item()
    >>> with trial(layer): _ = layer.weight.data.zero_()
    >>> layer.weight.item() == before
    True
    """
    tensors = [*model.parameters(), *model.buffers()]
    saved = [t.detach().clone() for t in tensors]
    try:
        yield model
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.data.copy_(value)


@dataclass(frozen=True)
class Bisect:
    """The smallest x in [low, high] with ok(x), for an ok that once true stays true towards `high`.

    Halves the interval until it is no wider than `tolerance`; `high` is taken to be ok and is not tried.

    >>> Bisect(0.0, 1.0, tolerance=0.1)(lambda x: x >= 0.3)
    0.3125
    """

    low: float
    high: float
    tolerance: float = 0.05

    def __call__(self, ok: Callable[[float], bool]) -> float:
        low, high = self.low, self.high
        while high - low > self.tolerance:
            middle = (low + high) / 2
            low, high = (low, middle) if ok(middle) else (middle, high)
        return high
