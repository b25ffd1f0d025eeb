"""N:M: n of every m neighbours along the input axis."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.exact import topk_mask_rows
from rarefy.core.roles import Pattern


@dataclass(frozen=True)
class NM(Pattern):
    """The best `n` of every `m` consecutive weights along the input axis, the last of [O, ..., I].

    `mask` keeps n/m of the matrix whatever the count asks for: it is the only reachable one. Under a bound that allows
    fewer than n in a group, it keeps what is allowed. Among equal scores the lower index is kept.

    Raises:
        BadInput: not 0 < n <= m, or an input axis that m does not divide.

    Source: Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378, section 3 (2:4).

    >>> NM(1, 2).mask(torch.tensor([[1., 3., 2., 2.]]), 2).tolist()
    [[False, True, True, False]]
    """

    n: int = 2
    m: int = 4
    name = "n:m"

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise BadInput(f"pattern {self.n}:{self.m}", "n:m keeps n of every m, 0 < n <= m", "pass for example 2:4")

    @property
    def text(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def span(self) -> int:
        return self.m

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(2, 4), cls(1, 4), cls(4, 8), cls(3, 3))

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        found = re.fullmatch(r"(\d+):(\d+)", text)
        return cls(int(found[1]), int(found[2])) if found else None

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        self.nearest(scores.shape, count)
        groups = scores.reshape(-1, self.m)
        allowed = None if bound is None else bound.reshape(-1, self.m)
        counts = torch.full((groups.shape[0],), self.n, device=scores.device)
        if allowed is not None:
            counts = counts.minimum(allowed.sum(1))
        return topk_mask_rows(groups, counts, allowed).view(scores.shape)

    def nearest(self, shape: Sequence[int], count: int) -> int:
        if not shape or shape[-1] % self.m:
            raise BadInput(
                f"shape {tuple(shape)}", f"the pattern {self.n}:{self.m} needs an input axis (the last) that {self.m} divides", "exclude this matrix or use another pattern"
            )
        return math.prod(shape) * self.n // self.m
