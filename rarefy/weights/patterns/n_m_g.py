"""N:M:G: n of every m neighbours, each of the ways to do so exactly g times in a group of output rows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.roles import Pattern
from rarefy.kernels.n_m_g.assign import assign, holds, kept
from rarefy.layouts.registry import STEN


@dataclass(frozen=True)
class NMG(Pattern):
    """`n` of every `m` consecutive weights along the input axis, each of the C(m, n) patterns for exactly `g` rows of a group.

    The outputs of [O, ..., I] are cut in groups of C(m, n) g rows. In every group, and for every chunk of m inputs by
    itself, rows are assigned to patterns so that the kept scores add up to the most: greedily over all (row, pattern)
    pairs, then by swaps of two rows while one gains. In a last group that is not full a pattern occurs at most g times.
    n/m of the matrix stays whatever the count asks for. Under a bound a row keeps what is allowed of its pattern.

    A larger g is the weaker demand: what obeys g obeys every multiple of it, so the best kept sum does not fall along
    multiples of g, and nears that of n:m.

    Raises:
        BadInput: not 0 < n <= m <= 8, g below 1, an input axis that m does not divide, or NaN scores.

    Source: Ivanov et al., STen, arXiv 2304.07613, section on grouped n:m; sparsifier as in spcl/sten grouped_nm.

    >>> import torch
    >>> NMG(1, 2, 1).mask(torch.tensor([[3., 1.], [5., 0.]]), 2).tolist()
    [[False, True], [True, False]]
    """

    n: int = 2
    m: int = 4
    g: int = 16
    name = "n:m:g"
    paper = STEN

    def __post_init__(self) -> None:
        if not (0 < self.n <= self.m <= 8 and self.g >= 1):
            raise BadInput(f"pattern {self.text}", "n:m:g keeps n of every m, 0 < n <= m <= 8, and has each pattern g times", "pass for example 2:4:16")

    @property
    def text(self) -> str:
        return f"{self.n}:{self.m}:{self.g}"

    @property
    def span(self) -> int:
        return self.m

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(2, 4, 2), cls(1, 2, 3), cls(2, 2, 3))

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        found = re.fullmatch(r"(\d+):(\d+):(\d+)", text)
        return cls(int(found[1]), int(found[2]), int(found[3])) if found else None

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        self.nearest(scores.shape, count)
        chunks = self._chunks(scores)
        allowed = None if bound is None else self._chunks(bound)
        worth = chunks if allowed is None else chunks.where(allowed, 0.0)
        mask = kept(worth, assign(worth, self.n, self.g), self.n)
        return (mask if allowed is None else mask & allowed).view(scores.shape)

    def _chunks(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], -1, self.m)

    def holds(self, mask: Tensor) -> bool:
        """Whether a mask [O, ..., I] obeys the pattern."""
        return holds(self._chunks(mask), self.n, self.g)

    def nearest(self, shape: Sequence[int], count: int) -> int:
        if not shape or shape[-1] % self.m:
            raise BadInput(f"shape {tuple(shape)}", f"the pattern {self.text} needs an input axis (the last) that {self.m} divides", "exclude this matrix or use another pattern")
        return math.prod(shape) * self.n // self.m
