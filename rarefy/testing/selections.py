"""The contract of a Selection: pure, of the tensor's shape, and able to decide as soon as its `passes` says."""

from __future__ import annotations

import torch

from rarefy.core.roles import Selection
from rarefy.testing import figures
from rarefy.testing.contract import contract

SHAPES = ((12, 8), (2, 6, 8))


@contract(Selection)
def masks_are_pure_and_of_the_shape(part: Selection) -> None:
    for shape in SHAPES:
        values = figures.weight(*shape)
        before, mask = values.clone(), part.mask(values)
        assert mask.dtype == torch.bool and mask.shape == values.shape, f"{part!r} makes {mask.dtype} {tuple(mask.shape)} of {shape}"
        assert torch.equal(values, before), f"{part!r} changed the values that it was given"
        assert torch.equal(part.mask(values), mask), f"{part!r}: two masks of one tensor differ"


@contract(Selection)
def what_stays_stays_again(part: Selection) -> None:
    for shape in SHAPES:
        values = figures.weight(*shape)
        mask = part.mask(values)
        assert torch.equal(part.mask(values * mask, mask) & mask, mask), f"{part!r} drops some of what it kept of {shape}"


@contract(Selection)
def it_decides_as_soon_as_it_says(part: Selection) -> None:
    values = figures.weight(12, 8)
    assert part.passes in ("streaming", "blocking", "materialising"), f"{part!r} passes {part.passes}"
    if part.passes == "materialising":
        return
    span = 1 if part.passes == "streaming" else part.span
    parts = [part.mask(block) for block in values.split(span, 1)]
    if part.passes == "streaming":
        parts = [torch.stack([part.mask(value[None])[0] for value in column.flatten()])[:, None] for column in values.split(1, 1)]
    assert torch.equal(torch.cat(parts, 1), part.mask(values)), f"{part!r} is {part.passes} and decides otherwise when it sees {span} columns"
