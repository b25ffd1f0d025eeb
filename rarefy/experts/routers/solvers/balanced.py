"""Balanced assignment: rows to experts, none with too many, at the greatest total affinity; exact."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor


def balanced(affinity: Tensor, valid: Tensor | None = None, live: Tensor | None = None) -> Tensor:
    """The expert [R] of every row in ``max sum_r a[r, pi(r)]`` with at most ``ceil(T / L)`` rows per expert; E (nobody) for padding.

    affinity [R, E], valid [R] (T of them), live [E] (L of them). Where L divides T every live expert gets exactly T / L rows;
    otherwise the rest is what padding with rows of zero affinity would leave. An affinity that is not finite counts as the least
    finite one. Exact on affinities rounded to 2^-40 of the largest: as integers they add up without rounding, and equals stay equal.

    Every row starts at its best expert; then, while an expert has too many, one row per step moves along the cheapest chain of
    swaps to an expert with room (successive shortest paths, over experts only). Of equals the lower row and expert stay.

    >>> balanced(torch.tensor([[2.0, 0.0], [3.0, 0.0], [1.0, 0.0], [9.0, 0.0]])).tolist()
    [1, 0, 1, 0]
    """
    out: Tensor = _balanced(affinity.detach(), valid, live)
    return out


@torch.library.custom_op("rarefy::balanced_assignment", mutates_args=(), schema="(Tensor affinity, Tensor? valid, Tensor? live) -> Tensor")
def _balanced(affinity: Tensor, valid: Tensor | None, live: Tensor | None) -> Tensor:
    rows, experts = affinity.shape
    keep = np.ones(rows, bool) if valid is None else valid.reshape(-1).cpu().numpy()
    open_ = np.ones(experts, bool) if live is None else live.cpu().numpy()
    out = np.full(rows, experts)
    if keep.any() and open_.any():
        a = _integers(affinity.detach().double().cpu().numpy()[keep][:, open_])
        out[keep] = np.flatnonzero(open_)[_assign(a)]
    return torch.from_numpy(out).to(affinity.device)


@_balanced.register_fake
def _(affinity: Tensor, valid: Tensor | None, live: Tensor | None) -> Tensor:
    return affinity.new_empty(affinity.shape[0], dtype=torch.long)


def _integers(a: Any) -> Any:
    finite = np.isfinite(a)
    a = np.where(finite, a, a[finite].min() if finite.any() else 0.0)
    top = np.abs(a).max()
    return np.rint(a * (2.0**40 / top)).astype(np.int64) if top > 0 else a.astype(np.int64)


def _assign(a: Any) -> Any:
    rows, experts = a.shape
    limit = -(-rows // experts)
    chosen = a.argmax(1)
    count = np.bincount(chosen, minlength=experts)
    loss, mover = np.empty((experts, experts), np.int64), np.empty((experts, experts), np.int64)
    for e in range(experts):
        _refresh(a, chosen, e, loss, mover)
    while (count > limit).any():
        path = _cheapest(loss, count > limit, count < limit)
        moves = [(mover[e, f], f) for e, f in pairwise(path)]
        for row, f in moves:
            chosen[row] = f
        count[path[0]] -= 1
        count[path[-1]] += 1
        for e in path:
            _refresh(a, chosen, e, loss, mover)
    return chosen


_FAR = np.int64(2**61)


def _refresh(a: Any, chosen: Any, e: int, loss: Any, mover: Any) -> None:
    """What it costs to move one row from e to each other expert, and which row that is (of equals the last)."""
    mine = np.flatnonzero(chosen == e)[::-1]
    loss[e], mover[e] = _FAR, -1
    if mine.size:
        costs = a[mine, e][:, None] - a[mine]
        best = costs.argmin(0)
        loss[e], mover[e] = costs[best, np.arange(a.shape[1])], mine[best]
        loss[e, e] = _FAR


def _cheapest(loss: Any, full: Any, room: Any) -> list[int]:
    """The shortest path over experts from a full one to one with room (Bellman and Ford; costs may be negative, no cycle is)."""
    distance, before = np.where(full, 0, _FAR), np.full(len(full), -1)
    while True:
        step = np.where(distance[:, None] < _FAR, np.minimum(loss, _FAR), _FAR) + np.where(distance < _FAR, distance, 0)[:, None]
        step = np.where(loss >= _FAR, _FAR, step)
        best = step.argmin(0)
        reached = step[best, np.arange(len(full))]
        better = reached < distance
        if not better.any():
            break
        distance, before = np.where(better, reached, distance), np.where(better, best, before)
    ends = np.flatnonzero(room)
    path = [int(ends[::-1][distance[ends[::-1]].argmin()])]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return path[::-1]
