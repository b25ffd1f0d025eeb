"""SET: the smallest positive and the largest negative weights go, each side by its own fraction, and chance grows as many."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from rarefy.core.exact import topk_mask
from rarefy.core.records import Delta, Entries
from rarefy.weights.rewiring.set import SET
from tests.evidence import check

NAME = "a fraction of each sign goes, nearest to zero first; as many come at random empty places, which start from zero"
Rewire = Callable[..., Delta]


def holds(rewire: Rewire) -> None:
    """Skewed values: the positive ones are ten times smaller, so both signs go only if each has its own quota."""
    seen: set[int] = set()
    for seed in range(5):
        g = Generator().manual_seed(seed)
        weight = torch.randn(8, 9, generator=g)
        weight = torch.where(weight > 0, weight / 10, weight)
        mask = topk_mask(torch.rand(8, 9, generator=g), 20)
        entries = Entries(weight[mask], mask.flatten().nonzero()[:, 0], (8, 9))
        delta = rewire(entries, count=20, fraction=0.4, bound=None, generator=g)
        value = dict(zip(entries.index.tolist(), entries.values.tolist(), strict=True))
        up, down = sorted((i for i in value if value[i] > 0), key=value.__getitem__), sorted((i for i in value if value[i] < 0), key=value.__getitem__, reverse=True)
        assert sorted(delta.drop.tolist()) == sorted(up[: int(0.4 * len(up))] + down[: int(0.4 * len(down))])
        assert len(set(delta.grow.tolist())) == len(delta.drop)
        assert not set(delta.grow.tolist()) & set(value)
        seen |= set(delta.grow.tolist())
    assert len(seen) > 20, "chance grows in many places"


def by_magnitude(entries: Entries, *, count: int, fraction: float, bound: Tensor | None, generator: Generator) -> Delta:
    """The twin: one ranking of magnitudes over both signs."""
    drop = entries.index[topk_mask(-entries.values.abs(), int(fraction * len(entries.index)))]
    return Delta(drop, SET().rewire(entries, count=count, fraction=fraction, bound=bound, generator=generator).grow[: len(drop)])


@check("set", NAME, kind="method")
def test_set() -> None:
    holds(SET().rewire)
    assert (SET.policy.at, SET.policy.grow_weight, SET.policy.grow_state) == ("before", "zero", "zero")


@check("set", NAME, kind="twin")
def test_one_ranking_over_both_signs_fails() -> None:
    with pytest.raises(AssertionError):
        holds(by_magnitude)


def test_where_there_is_little_room_fewer_are_dropped() -> None:
    entries = Entries(torch.tensor([1.0, -1.0, 2.0, -2.0]), torch.arange(4), (1, 5))
    delta = SET().rewire(entries, count=4, fraction=1.0, bound=None, generator=Generator())
    assert len(delta.drop) == len(delta.grow) <= 1
