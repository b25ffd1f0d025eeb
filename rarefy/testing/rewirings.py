"""The contract of a Rewiring: the count asked for, dropped from what is stored, grown where nothing is, inside the bound."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rarefy.core.records import Delta, Entries, StatePolicy
from rarefy.core.roles import Rewiring, asks
from rarefy.testing import figures
from rarefy.testing.contract import contract

SHAPE = (6, 8)
Case = tuple[Entries, int, float, Tensor | None]


def _cases() -> Iterator[Case]:
    """(entries, count, fraction, bound): counts that stay and that rise, with and without a bound, ties included."""
    scores = torch.rand(SHAPE, generator=figures.seeded(2)).flatten()
    bound = torch.rand(SHAPE, generator=figures.seeded(4)) < 0.7
    allowed = bound.flatten().nonzero()[:, 0]
    free, inside = scores.argsort()[:16].sort().values, allowed[scores[allowed].argsort()[:16]].sort().values
    values = figures.weight(16)
    for fraction in (0.0, 0.3, 1.0):
        for stored in (values, torch.ones(16)):
            yield Entries(stored, free, SHAPE), 16, fraction, None
            yield Entries(stored, free, SHAPE), 20, fraction, None
            yield Entries(stored, inside, SHAPE), 16, fraction, bound
            yield Entries(stored, inside, SHAPE), 18, fraction, bound


def _rewire(part: Rewiring, case: Case) -> Delta:
    entries, count, fraction, bound = case
    given = {"gradient": figures.weight(*SHAPE, seed=5), "weight": figures.weight(*SHAPE, seed=6), "final": False}
    wanted = {name: given[name] for name in asks(part.rewire) if name in given}
    return part.rewire(entries, count=count, fraction=fraction, bound=bound, generator=figures.seeded(), **wanted)


def _after(entries: Entries, delta: Delta) -> Tensor:
    """The mask that a rewiring leaves."""
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    flat = mask.view(-1)
    flat[entries.index] = True
    flat[delta.drop] = False
    flat[delta.grow] = True
    return mask


@contract(Rewiring)
def counts_are_conserved(part: Rewiring) -> None:
    for case in _cases():
        entries, count, fraction, _ = case
        delta = _rewire(part, case)
        mask = _after(entries, delta)
        after = len(entries.index) - len(delta.drop) + len(delta.grow)
        assert after == int(mask.sum()), f"{part!r} grows what it keeps or drops what it has not"
        assert count - part.short(mask) <= after <= count, f"{part!r} leaves {after} entries at fraction {fraction}, {count} asked"
        if delta.fill is not None:
            assert len(delta.fill) == len(delta.grow), f"{part!r} fills {len(delta.fill)} of {len(delta.grow)} grown entries"


@contract(Rewiring)
def without_a_fraction_nothing_is_dropped(part: Rewiring) -> None:
    for case in _cases():
        if case[2] == 0.0:
            delta = _rewire(part, case)
            assert not len(delta.drop), f"{part!r} drops {len(delta.drop)} entries at fraction 0"


@contract(Rewiring)
def what_is_dropped_was_stored_and_what_grows_was_not(part: Rewiring) -> None:
    for case in _cases():
        entries, _, _, bound = case
        delta = _rewire(part, case)
        stored, drop, grow = set(entries.index.tolist()), delta.drop.tolist(), delta.grow.tolist()
        assert len({*drop}) == len(drop), f"{part!r} drops a position twice"
        assert {*drop} <= stored, f"{part!r} drops {sorted({*drop} - stored)}, which were not stored"
        assert len({*grow}) == len(grow), f"{part!r} grows a position twice"
        assert not {*grow} & (stored - {*drop}), f"{part!r} grows {sorted({*grow} & (stored - {*drop}))}, which are stored"
        allowed = set(range(entries.shape[0] * entries.shape[1])) if bound is None else set(bound.flatten().nonzero()[:, 0].tolist())
        assert {*grow} <= allowed, f"{part!r} grows {sorted({*grow} - allowed)}, outside the bound"


@contract(Rewiring)
def rewiring_is_pure_and_declares_its_policy(part: Rewiring) -> None:
    assert isinstance(getattr(part, "policy", None), StatePolicy), f"{part!r} does not declare what becomes of weights and optimizer state"
    for case in _cases():
        entries, bound = case[0], case[3]
        before = (entries.values.clone(), entries.index.clone(), None if bound is None else bound.clone())
        first, again = _rewire(part, case), _rewire(part, case)
        assert torch.equal(first.drop, again.drop), f"{part!r}: the same generator drops other entries"
        assert torch.equal(first.grow, again.grow), f"{part!r}: the same generator grows other entries"
        assert torch.equal(entries.values, before[0]), f"{part!r} changed the stored values"
        assert torch.equal(entries.index, before[1]), f"{part!r} changed the stored positions"
        assert bound is None or torch.equal(bound, before[2]), f"{part!r} changed the bound"  # type: ignore[arg-type]
