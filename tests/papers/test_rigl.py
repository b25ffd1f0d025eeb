"""RigL: which entries go and come, that they start from zero, and that the update replaces the step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from rarefy.core.exact import topk_mask
from rarefy.core.records import Delta, Entries
from rarefy.weights.rewiring.rigl import RigL
from tests.evidence import check

NAME = "drops the smallest, grows the largest dense gradients among all but the kept, count exact, instead of the step"
Rewire = Callable[..., Delta]


def holds(rewire: Rewire) -> None:
    for seed in range(5):
        g = Generator().manual_seed(seed)
        weight, gradient = torch.randn(8, 9, generator=g), torch.randn(8, 9, generator=g)
        mask = topk_mask(torch.rand(8, 9, generator=g), 20)
        entries = Entries(weight[mask], mask.flatten().nonzero()[:, 0], (8, 9))
        delta = rewire(entries, count=20, fraction=0.33, bound=None, generator=g, gradient=gradient)
        # By hand: python sorts over (figure, flat position).
        active = entries.index.tolist()
        drop = sorted(active, key=lambda i: abs(float(weight.flatten()[i])))[:6]
        kept = set(active) - set(drop)
        grow = sorted((i for i in range(72) if i not in kept), key=lambda i: -abs(float(gradient.flatten()[i])))[:6]
        assert sorted(delta.drop.tolist()) == sorted(drop)
        assert sorted(delta.grow.tolist()) == sorted(grow)
        assert len(kept | set(delta.grow.tolist())) == 20


def masked_gradient(entries: Entries, *, count: int, fraction: float, bound: Tensor | None, generator: Generator, gradient: Tensor) -> Delta:
    """The twin: looks at the gradient after the mask, where every empty place is zero."""
    seen = torch.zeros_like(gradient).flatten()
    seen[entries.index] = gradient.flatten()[entries.index]
    return RigL().rewire(entries, count=count, fraction=fraction, bound=bound, generator=generator, gradient=seen.view_as(gradient))


@check("rigl", NAME, kind="method")
def test_rigl() -> None:
    holds(RigL().rewire)
    assert RigL.policy.at == "instead"
    assert (RigL.policy.grow_weight, RigL.policy.grow_state) == ("zero", "zero")


@check("rigl", NAME, kind="twin")
def test_a_masked_gradient_fails() -> None:
    with pytest.raises(AssertionError):
        holds(masked_gradient)
