"""The contract of a Pattern: exactly the nearest count, nested, ties by lower index, idempotent, pure, inside its bound; or a BadInput."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from rarefy.core.errors import BadInput
from rarefy.core.roles import Pattern
from rarefy.testing import figures
from rarefy.testing.contract import contract

SHAPES = ((1, 1), (7, 13), (8, 16), (4, 3, 3, 8), (12, 24))


def _reachable(part: Pattern) -> Iterator[tuple[tuple[int, ...], int]]:
    """(shape, wish) for the shapes that the part does not refuse."""
    for shape in SHAPES:
        numel = torch.Size(shape).numel()
        for wish in sorted({0, 1, numel // 3, numel // 2, numel - 1, numel}):
            try:
                part.nearest(shape, wish)
            except BadInput:
                continue
            yield shape, wish


@contract(Pattern)
def counts_are_the_nearest_reachable(part: Pattern) -> None:
    seen = 0
    for shape, wish in _reachable(part):
        scores, count, seen = figures.weight(*shape).abs(), part.nearest(shape, wish), seen + 1
        mask = part.mask(scores, count)
        assert mask.dtype == torch.bool, f"{part!r}: {int(mask.sum())} of {shape} kept, nearest says {count}"
        assert mask.shape == scores.shape, f"{part!r}: {int(mask.sum())} of {shape} kept, nearest says {count}"
        assert int(mask.sum()) == count, f"{part!r}: {int(mask.sum())} of {shape} kept, nearest says {count}"
        assert part.nearest(shape, count) == count, f"{part!r}: {count} is reachable in {shape} and nearest says {part.nearest(shape, count)}"
        assert torch.equal(mask, part.mask(scores, wish)), f"{part!r}: a wish of {wish} in {shape} is not served by its nearest count {count}"
    assert seen, f"{part!r} refuses every shape of {SHAPES}"


@contract(Pattern)
def masks_are_idempotent(part: Pattern) -> None:
    for shape, wish in _reachable(part):
        scores, count = figures.weight(*shape).abs() + 0.1, part.nearest(shape, wish)
        mask = part.mask(scores, count)
        assert torch.equal(part.mask(scores * mask, count), mask), f"{part!r}: masking the masked scores of {shape} at {count} changes the mask"


@contract(Pattern)
def a_smaller_count_is_nested_in_a_larger_one(part: Pattern) -> None:
    for scores in (*(figures.weight(*shape).abs() for shape in SHAPES), *(torch.ones(shape) for shape in SHAPES)):
        wishes = sorted({*range(0, scores.numel(), max(1, scores.numel() // 11)), scores.numel()})
        try:
            masks = [(count, part.mask(scores, count)) for count in sorted({part.nearest(scores.shape, wish) for wish in wishes})]
        except BadInput:
            continue
        for (small, inner), (large, outer) in pairwise(masks):
            assert not bool((inner & ~outer).any()), f"{part!r}: what is kept of {tuple(scores.shape)} at {small} is not all kept at {large}"


@contract(Pattern)
def masking_is_pure(part: Pattern) -> None:
    for shape, wish in _reachable(part):
        scores, bound, count = figures.weight(*shape).abs(), torch.ones(shape, dtype=torch.bool), part.nearest(shape, wish)
        before = scores.clone()
        first, again = part.mask(scores, count, bound), part.mask(scores, count, bound)
        assert torch.equal(scores, before), f"{part!r} changed the scores that it was given"
        assert bool(bound.all()), f"{part!r} changed the bound that it was given"
        assert torch.equal(first, again), f"{part!r}: the same scores of {shape} give two masks"


@contract(Pattern)
def equal_scores_keep_an_exact_count(part: Pattern) -> None:
    for shape, wish in _reachable(part):
        count = part.nearest(shape, wish)
        first, again = part.mask(torch.ones(shape), count), part.mask(torch.ones(shape), count)
        assert int(first.sum()) == count, f"{part!r}: ties in {shape} at {count} give {int(first.sum())}"
        assert torch.equal(first, again), f"{part!r}: ties in {shape} at {count} give {int(first.sum())}"
        if count:
            assert bool(first.flatten()[0]), f"{part!r}: among equal scores the lower index is kept"


@contract(Pattern)
def bounds_are_respected(part: Pattern) -> None:
    for shape, wish in _reachable(part):
        bound = torch.rand(shape, generator=figures.seeded(4)) < 0.6
        rows = bound.flatten(1).sum(1)
        count = min(part.nearest(shape, wish), int(rows.min()) * shape[0])
        mask = part.mask(figures.weight(*shape).abs(), count, bound)
        assert not bool((mask & ~bound).any()), f"{part!r} keeps a forbidden entry of {shape}"


@contract(Pattern)
def nan_scores_are_refused(part: Pattern) -> None:
    for shape, wish in _reachable(part):
        try:
            part.mask(torch.full(shape, float("nan")), wish)
        except BadInput:
            continue
        raise AssertionError(f"{part!r} ranks NaN scores of {shape}")
