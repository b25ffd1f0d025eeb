"""Which row takes which pattern, so that every pattern is taken equally often and the most is kept: greedy, then swaps."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.core.errors import BadInput
from rarefy.kernels.n_m_g.reference import patterns

PAIRS = 2**22  # (row, pattern) pairs that are rated at a time
GAIN = 1e-9  # of the largest rating: what a swap must gain, so that rounding ends the search


def assign(ratings: Tensor, n: int, g: int) -> Tensor:
    """The pattern of every row and chunk: int64 [O, K] for what each weight is worth, [O, K, m].

    Rows are cut in groups of C(m, n) g, the last one filled up with rows of no worth; in each group and chunk every
    pattern goes to exactly g rows. First the best of all (row, pattern) pairs whose row is free and whose pattern is
    not used up, again and again; then, while that gains, the best pair of rows swaps patterns.

    Raises:
        BadInput: NaN.

    >>> assign(torch.tensor([[[3.0, 1.0]], [[5.0, 0.0]]]), n=1, g=1).tolist()  # both want the first; the second row wants it more
    [[1], [0]]
    """
    if torch.isnan(ratings).any():
        raise BadInput(f"scores of shape {tuple(ratings.shape)} hold NaN", "a score must be a number", "check the calibration data for NaN or inf")
    rows, _, m = ratings.shape
    table = torch.tensor(patterns(n, m), device=ratings.device)
    size = len(table) * g
    worth = F.pad(ratings.detach().double().nan_to_num(), (0, 0, 0, 0, 0, -rows % size))
    groups = worth.shape[0] // size
    width = max(1, PAIRS // max(1, groups * size * len(table)))
    found = [_assigned(part.unflatten(0, (groups, size)), table, g).flatten(0, 1)[:rows] for part in worth.split(width, dim=1)]
    return torch.cat(found, 1)


def _assigned(worth: Tensor, table: Tensor, g: int) -> Tensor:
    """[G, R, K, m] -> [G, R, K]."""
    groups, size, chunks, _ = worth.shape
    values = worth[..., table].sum(-1).transpose(1, 2).reshape(groups * chunks, size, len(table))
    chosen = _swapped(values, _greedy(values, g), g)
    return chosen.view(groups, chunks, size).transpose(1, 2)


def _greedy(values: Tensor, g: int) -> Tensor:
    """[B, R, C] -> [B, R]."""
    problems, size, kinds = values.shape
    order = values.flatten(1).argsort(dim=1, descending=True, stable=True)
    chosen = torch.full((problems, size), -1, device=values.device)
    left = torch.full((problems, kinds), g, device=values.device)
    each = torch.arange(problems, device=values.device)
    for step, pair in enumerate(order.unbind(1)):
        row, kind = pair // kinds, pair % kinds
        before = chosen[each, row]
        free = (before < 0) & (left[each, kind] > 0)
        chosen[each, row] = torch.where(free, kind, before)
        left[each, kind] -= free.long()
        if step % size == size - 1 and bool((chosen >= 0).all()):
            break
    return chosen


def _swapped(values: Tensor, chosen: Tensor, g: int) -> Tensor:
    kinds = values.shape[2]
    least = GAIN * values.abs().amax((1, 2)) if values.numel() else values.new_zeros(values.shape[0])
    active = torch.arange(values.shape[0], device=values.device)
    while active.numel():
        worth, now = values[active], chosen[active]
        slots = now.argsort(dim=1, stable=True)  # rows by the pattern that they have
        gain = (worth - worth.gather(2, now[..., None])).gather(1, slots[..., None].expand_as(worth)).unflatten(1, (kinds, g))
        best, which = gain.max(2)  # [B, pattern given up, pattern taken]
        total, pair = (best + best.transpose(1, 2)).flatten(1).max(1)
        better = total > least[active]
        active, slots, which = active[better], slots[better], which[better]
        one, other, each = pair[better] // kinds, pair[better] % kinds, torch.arange(active.numel(), device=values.device)
        chosen[active, slots[each, one * g + which[each, one, other]]] = other
        chosen[active, slots[each, other * g + which[each, other, one]]] = one
    return chosen


def kept(ratings: Tensor, chosen: Tensor, n: int) -> Tensor:
    """bool [O, K, m]: what the patterns of `assign` keep."""
    m = ratings.shape[2]
    table = F.one_hot(torch.tensor(patterns(n, m), device=chosen.device), m).sum(1).bool()
    return table[chosen]


def kinds(mask: Tensor, n: int) -> Tensor:
    """The pattern of every row and chunk of [O, K, m]: int64 [O, K], -1 where it keeps another number than n."""
    m = mask.shape[2]
    table = torch.tensor(patterns(n, m), device=mask.device)
    weights = 2 ** torch.arange(m, device=mask.device)
    number = torch.full((2**m,), -1, device=mask.device)
    number[weights[table].sum(1)] = torch.arange(len(table), device=mask.device)
    return number[(mask * weights).sum(-1)]


def tally(kinds: Tensor, patterns: int, g: int) -> Tensor:
    """How often each of so many patterns occurs in each group and chunk of [O, K]: int64 [G, K, C]."""
    rows, chunks = kinds.shape
    size = patterns * g
    groups = -(-rows // size)
    cell = torch.arange(rows, device=kinds.device)[:, None] // size * chunks + torch.arange(chunks, device=kinds.device)
    return torch.bincount((cell * patterns + kinds)[kinds >= 0], minlength=groups * chunks * patterns).view(groups, chunks, patterns)


def holds(mask: Tensor, n: int, g: int) -> bool:
    """Whether [O, K, m] keeps n of every m, and every pattern g times in every group and chunk (at most g times in a last group that is not full).

    >>> holds(torch.tensor([[[True, False]], [[False, True]]]), 1, 1), holds(torch.tensor([[[True, False]], [[True, False]]]), 1, 1)
    (True, False)
    """
    found, ways = kinds(mask, n), math.comb(mask.shape[2], n)
    return bool((found >= 0).all()) and bool((tally(found, ways, g) <= g).all())  # a full group is then exact
