"""RigL: which entries go and come, that they start from zero, and that the update replaces the step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from rarefy.core.exact import topk_mask
from rarefy.core.records import Delta, Entries, Progress
from rarefy.weights.rewiring.rigl import RIGL, RigL
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


def test_what_was_just_dropped_may_grow_again() -> None:
    """Algorithm 1 excludes only what is kept: here the dropped entry has the largest gradient."""
    entries = Entries(torch.tensor([5.0, 1.0]), torch.tensor([0, 1]), (1, 3))
    delta = RigL().rewire(entries, count=2, fraction=0.5, bound=None, generator=Generator(), gradient=torch.tensor([[9.0, 8.0, 2.0]]))
    assert (delta.drop.tolist(), delta.grow.tolist()) == ([1], [1])


def test_the_fraction_is_the_papers_half_cosine_and_stops_at_three_quarters() -> None:
    (phase,) = RIGL.phases(0.1, 4000)
    for step, by_hand in ((0, 0.3), (1500, 0.15), (3000, 0.0), (3999, 0.0)):
        assert abs(phase.fraction(Progress(phase_step=step)) - by_hand) < 1e-12
    assert phase.every == 100
