"""The contract of an Adaptation: unchanged at the start, able to learn, and never a value where there was a zero."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.core.roles import View, asks
from rarefy.surgery.adapters import Adaptation
from rarefy.testing import figures
from rarefy.testing.contract import contract


def _sparse() -> Tensor:
    weight = figures.weight(12, 8)
    return weight * (torch.arange(96).view(12, 8) % 4 < 2)


def _view(part: Adaptation, weight: Tensor) -> View:
    asked = {name: figures.gradients(weight) for name in asks(part.view)}
    return part.view(weight, generator=figures.seeded(), **asked)


@contract(Adaptation)
def nothing_changes_at_the_start(part: Adaptation) -> None:
    for weight in (_sparse(), _sparse().bfloat16()):
        assert torch.equal(_view(part, weight)(weight), weight), f"{part!r} changes the weight before it has learned"


@contract(Adaptation)
def a_seed_decides_what_is_drawn(part: Adaptation) -> None:
    weight = _sparse()
    first, again = (list(_view(part, weight).parameters()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{part!r} draws from another generator than it is given"


@contract(Adaptation)
def something_learns_in_float32(part: Adaptation) -> None:
    weight = _sparse().bfloat16()
    view = _view(part, weight)
    learned = list(view.parameters())
    view(weight).float().square().sum().backward()
    assert learned and all(p.dtype == torch.float32 for p in learned), f"{part!r} learns in {[p.dtype for p in learned]}"
    assert any(p.grad is not None and bool(p.grad.any()) for p in learned), f"{part!r} gets no gradient at the start"
    assert part.lr > 0


@contract(Adaptation)
def whatever_it_learns_zeros_stay_zero(part: Adaptation) -> None:
    weight = _sparse()
    view = _view(part, weight)
    with torch.no_grad():
        for i, p in enumerate(view.parameters()):
            p.add_(torch.randn(p.shape, generator=figures.seeded(i)))
    found = view.export(weight).weight
    assert not torch.equal(found, weight), f"{part!r} does not change with what it learned"
    assert not bool(found[weight == 0].any()), f"{part!r} fills zeros"
