"""Which entries of a tensor stay: all, those that stay already, the large ones, those of a pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.exact import keep_count, topk_mask
from rarefy.core.roles import Pattern, Selection

BLOCKING, MATERIALISING = "blocking", "materialising"


@dataclass(frozen=True)
class All(Selection):
    """Everything stays.

    >>> All().mask(torch.tensor([0.0, 2.0])).tolist()
    [True, True]
    """

    name = "all"

    def mask(self, values: Tensor, kept: Tensor | None = None) -> Tensor:
        return torch.ones_like(values, dtype=torch.bool)


@dataclass(frozen=True)
class Same(Selection):
    """What stays already, whatever the values are now; without a mask, what is not zero.

    >>> Same().mask(torch.tensor([0.0, 2.0]), torch.tensor([True, False])).tolist()
    [True, False]
    """

    name = "same"

    def mask(self, values: Tensor, kept: Tensor | None = None) -> Tensor:
        return values != 0 if kept is None else kept


@dataclass(frozen=True)
class AtLeast(Selection):
    """What is not smaller in magnitude than a threshold; NaN stays, so that it is seen.

    Raises:
        BadInput: a threshold that is negative or no number.

    >>> AtLeast(1.0).mask(torch.tensor([0.5, -1.0])).tolist()
    [False, True]
    """

    threshold: float = 0.0
    name = "at-least"

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise BadInput(f"threshold {self.threshold}", "a threshold is a magnitude, 0 or more")

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return cls(), cls(0.7)

    def mask(self, values: Tensor, kept: Tensor | None = None) -> Tensor:
        return ~(values.abs() < self.threshold)


@dataclass(frozen=True)
class Largest(Selection):
    """The share `density` of a tensor that is largest in magnitude, under a pattern or, without one, wherever it lies.

    A tensor [..., C] is seen as a matrix of rows of C. A pattern that chooses in neighbouring columns is blocking, as
    n:m and n:m:g are; any other choice needs the whole tensor.

    Raises:
        BadInput: a density outside [0, 1], a shape that the pattern does not fit, or NaN.

    >>> Largest(0.5).mask(torch.tensor([[1.0, -3.0], [2.0, 0.0]])).tolist()
    [[False, True], [True, False]]
    """

    density: float = 0.5
    pattern: Pattern | None = None
    name = "largest"

    def __post_init__(self) -> None:
        keep_count(1, self.density)

    @property
    def passes(self) -> str:
        return BLOCKING if self.span > 1 else MATERIALISING

    @property
    def span(self) -> int:
        return 1 if self.pattern is None else self.pattern.span

    def mask(self, values: Tensor, kept: Tensor | None = None) -> Tensor:
        scores = values.detach().abs().reshape(-1, values.shape[-1] if values.dim() else 1)
        count = keep_count(scores.numel(), self.density)
        mask = topk_mask(scores, count) if self.pattern is None else self.pattern.mask(scores, self.pattern.nearest(tuple(scores.shape), count))
        return mask.view(values.shape)
