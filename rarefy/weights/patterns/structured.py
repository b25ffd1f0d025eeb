"""Structured patterns: weights stay or go in groups of one size; blocks, output rows, input columns."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.exact import topk_mask, topk_mask_rows
from rarefy.core.roles import Pattern


def nearest_multiple(count: int, size: int, total: int) -> int:
    """The multiple of `size` nearest to `count` within [0, total], ties downwards.

    >>> [nearest_multiple(count, 4, 8) for count in (2, 3, 6, 7, 99)]
    [0, 4, 4, 8, 8]
    """
    if size == 0:
        return 0
    return min(max((2 * count + size - 1) // (2 * size), 0) * size, total)


def _keep_groups(scores_GS: Tensor, count: int, bound_GS: Tensor | None) -> Tensor:
    """The bool [G, S] that keeps whole groups: those with the largest sum of (allowed) scores."""
    groups, size = scores_GS.shape
    total = scores_GS.double().sum(1) if bound_GS is None else scores_GS.double().where(bound_GS, 0.0).sum(1)
    eligible = None if bound_GS is None else bound_GS.any(1)
    wanted = nearest_multiple(count, size, groups * size) // max(size, 1)
    kept = topk_mask(total, wanted if eligible is None else min(wanted, int(eligible.sum())), eligible)
    mask = kept[:, None].expand(groups, size)
    return mask if bound_GS is None else mask & bound_GS


@dataclass(frozen=True)
class Block(Pattern):
    """Whole blocks of `rows` x `columns` of the matrix [O, rest], the best by their sum of scores.

    Reachable counts are multiples of rows * columns. Under a bound a block counts, and keeps, what is allowed in it.
    Among equal blocks the lower one in row-major order is kept.

    Raises:
        BadInput: a side below 1, or a matrix that the block does not tile.

    >>> import torch
    >>> Block(2, 1).mask(torch.tensor([[1., 2.], [1., 2.]]), 2).tolist()
    [[False, True], [False, True]]
    """

    rows: int = 4
    columns: int = 1
    name = "block:RxC"

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise BadInput(f"pattern {self.text}", "a block has at least one row and one column", "pass for example block:4x1")

    @property
    def text(self) -> str:
        return f"block:{self.rows}x{self.columns}"

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(4, 1), cls(2, 2), cls(1, 1))

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        found = re.fullmatch(r"block:(\d+)x(\d+)", text)
        return cls(int(found[1]), int(found[2])) if found else None

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        self.nearest(scores.shape, count)
        mask_GS = _keep_groups(self._groups(scores), count, None if bound is None else self._groups(bound))
        down, across = scores.shape[0] // self.rows, scores[0].numel() // self.columns
        return mask_GS.view(down, across, self.rows, self.columns).permute(0, 2, 1, 3).reshape(scores.shape)

    def _groups(self, tensor: Tensor) -> Tensor:
        down, across = tensor.shape[0] // self.rows, tensor[0].numel() // self.columns
        return tensor.reshape(down, self.rows, across, self.columns).permute(0, 2, 1, 3).reshape(down * across, self.rows * self.columns)

    def nearest(self, shape: Sequence[int], count: int) -> int:
        if not shape or shape[0] % self.rows or math.prod(shape[1:]) % self.columns:
            raise BadInput(
                f"shape {tuple(shape)}",
                f"the pattern block:{self.rows}x{self.columns} needs {self.rows} to divide the outputs and {self.columns} the rest",
                "exclude this matrix or use another block",
            )
        return nearest_multiple(count, self.rows * self.columns, math.prod(shape))


@dataclass(frozen=True)
class Rows(Pattern):
    """Whole output rows, the best by their sum of scores. Ties go to the lower row.

    >>> import torch
    >>> Rows().mask(torch.tensor([[1., 5.], [3., 4.]]), 2).tolist()
    [[False, False], [True, True]]
    """

    name = "rows"

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        self.nearest(scores.shape, count)
        flat = scores.reshape(scores.shape[0], -1)
        return _keep_groups(flat, count, None if bound is None else bound.reshape(flat.shape)).reshape(scores.shape)

    def nearest(self, shape: Sequence[int], count: int) -> int:
        return nearest_multiple(count, math.prod(shape[1:]), math.prod(shape))


@dataclass(frozen=True)
class Columns(Pattern):
    """Whole inputs (the last axis of [O, ..., I], kernel positions together), the best by their sum of scores.

    >>> import torch
    >>> Columns().mask(torch.tensor([[1., 5.], [3., 4.]]), 2).tolist()
    [[False, True], [False, True]]
    """

    name = "columns"

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        self.nearest(scores.shape, count)
        flat = scores.reshape(-1, scores.shape[-1])
        mask_GS = _keep_groups(flat.t(), count, None if bound is None else bound.reshape(flat.shape).t())
        return mask_GS.t().reshape(scores.shape)

    def nearest(self, shape: Sequence[int], count: int) -> int:
        return nearest_multiple(count, math.prod(shape[:-1]), math.prod(shape))


@dataclass(frozen=True)
class RowBlock(Pattern):
    """Blocks of `rows` x `columns`, the same number of them in every band of `rows` rows: the best of each band by their sum of scores.

    ``kept(band) = k`` for all bands, so that each output row costs the same. Where `columns` does not divide the inputs, the short
    block at the end of a band stays with the first one: reachable are 0 and ``O * (k * columns + rest)``, k from 1 (from 0 where
    a band has no whole block). Under a bound a block counts, and keeps, what is allowed in it; a band keeps fewer where fewer are allowed.
    Among equal blocks the one to the left is kept.

    Raises:
        BadInput: a side below 1, or a number of outputs that `rows` does not divide.

    >>> import torch
    >>> RowBlock(1, 2).mask(torch.tensor([[1., 1., 2., 2.], [9., 9., 8., 8.]]), 4).tolist()
    [[False, False, True, True], [True, True, False, False]]
    >>> RowBlock(1, 2).mask(torch.tensor([[1., 1., 2., 2., 0.]]), 3).tolist()
    [[False, False, True, True, True]]
    """

    rows: int = 1
    columns: int = 32
    name = "row-block:RxC"

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise BadInput(f"pattern {self.text}", "a block has at least one row and one column", "pass for example row-block:1x32")

    @property
    def text(self) -> str:
        return f"row-block:{self.rows}x{self.columns}"

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(1, 32), cls(1, 4), cls(2, 3), cls(1, 1))

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        found = re.fullmatch(r"row-block:(\d+)x(\d+)", text)
        return cls(int(found[1]), int(found[2])) if found else None

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        if torch.isnan(scores).any():  # the rest is not ranked, yet what made it NaN must be seen
            raise BadInput(f"scores of shape {tuple(scores.shape)} hold NaN", "a score must be a number", "check the calibration data for NaN or inf")
        across, reached = scores[0].numel(), self.nearest(scores.shape, count)
        whole = across // self.columns
        each = reached // scores.shape[0] // self.columns  # the rest is narrower than a block
        allowed = torch.ones_like(scores, dtype=torch.bool) if bound is None else bound
        room = self._blocks(allowed, whole).any(-1).any(1)
        total = self._blocks(scores.double().where(allowed, 0.0), whole).sum((1, 3))
        chosen = topk_mask_rows(total, room.sum(1).clamp_max(each), room).repeat_interleave(self.columns, 1)
        rest = torch.full((len(chosen), across - chosen.shape[1]), reached > 0, device=scores.device)
        return torch.cat([chosen, rest], 1).repeat_interleave(self.rows, 0).view(scores.shape) & allowed

    def _blocks(self, tensor: Tensor, whole: int) -> Tensor:
        """[bands, rows, whole blocks, columns] without the short block at the end."""
        flat = tensor.reshape(-1, self.rows, tensor[0].numel())
        return flat[..., : whole * self.columns].unflatten(-1, (whole, self.columns))

    def nearest(self, shape: Sequence[int], count: int) -> int:
        if not shape or shape[0] % self.rows:
            raise BadInput(f"shape {tuple(shape)}", f"the pattern {self.text} needs {self.rows} to divide the outputs", "exclude this matrix or use another block")
        whole, rest = divmod(math.prod(shape[1:]), self.columns)
        one = self.columns * shape[0]
        reachable = [0, *(k * one + rest * shape[0] for k in range(min(1, whole), whole + 1))]
        return min(reachable, key=lambda c: (abs(c - count), c))
