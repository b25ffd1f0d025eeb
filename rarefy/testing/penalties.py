"""The contract of a Penalty: its gradient is autograd's or a closed form, its inputs stay, off is exactly nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from rarefy.core.records import Progress
from rarefy.core.roles import Penalty, asks
from rarefy.testing.contract import contract
from rarefy.weights.penalties import ActivationPenalty, DualPenalty, GradientPenalty, LossPenalty, ProximalPenalty

KINDS = (LossPenalty, GradientPenalty, ProximalPenalty, DualPenalty, ActivationPenalty)


def _values(seed: int = 3) -> dict[str, Tensor]:
    """Two float64 tensors away from zero, where absolute values have a kink."""
    draw = Generator().manual_seed(seed)
    found = {"a.weight": torch.randn(3, 4, generator=draw, dtype=torch.float64), "b.weight": torch.randn(5, generator=draw, dtype=torch.float64)}
    return {key: value + value.sign() * 0.1 for key, value in found.items()}


def _slope_is_autograds(function: Callable[[Tensor], Tensor], at: Tensor, what: str) -> None:
    point = at.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(point), point)
    for index in (0, at.numel() - 1):
        step = torch.zeros_like(at).flatten()
        step[index] = 1e-5
        step = step.view_as(at)
        by_difference = (function(at + step) - function(at - step)) / 2e-5
        assert torch.allclose(slope.flatten()[index], by_difference.detach(), rtol=1e-4, atol=1e-8), f"{what}: the gradient is not that of the value"


@contract(Penalty)
def it_is_one_of_the_five_kinds(part: Penalty) -> None:
    assert sum(isinstance(part, kind) for kind in KINDS) == 1, f"{part!r} is no kind or several"


@contract(LossPenalty)
def a_loss_is_a_scalar_with_its_gradient_and_off_is_zero(part: LossPenalty) -> None:
    weights = _values()
    copies = {key: value.clone() for key, value in weights.items()}
    assert part.loss(weights, Progress()).shape == (), f"{part!r} is no scalar"
    for key in weights:
        _slope_is_autograds(lambda w, key=key: part.loss({**weights, key: w}, Progress()), weights[key], repr(part))  # type: ignore[misc]
    assert all(torch.equal(weights[key], copies[key]) for key in weights), f"{part!r} changed a weight"
    assert float(part.off().loss(weights, Progress())) == 0.0, f"{part!r} is not off"


@contract(GradientPenalty)
def an_edit_leaves_its_inputs_and_off_leaves_the_gradients(part: GradientPenalty) -> None:
    weights, gradients = _values(), _values(seed=4)
    support = {key: value > 0 for key, value in weights.items()}
    copies = {key: value.clone() for key, value in gradients.items()}
    edited = part.edit(weights, gradients, support, Progress())
    assert set(edited) <= set(gradients) and all(edited[k].shape == gradients[k].shape and edited[k].isfinite().all() for k in edited), f"{part!r}: keys or shapes differ"
    assert all(torch.equal(gradients[key], copies[key]) for key in gradients), f"{part!r} changed its input"
    assert any(not torch.equal(edited[key], gradients[key]) for key in edited), f"{part!r} does nothing"
    unchanged = part.off().edit(weights, gradients, support, Progress())
    assert all(torch.equal(unchanged[key], gradients[key]) for key in unchanged), f"{part!r} is not off"


@contract(ProximalPenalty)
def a_proximal_step_shrinks_towards_zero_and_off_is_the_identity(part: ProximalPenalty) -> None:
    weights = _values()
    rates = dict.fromkeys(weights, 0.1)
    moved = part.prox(weights, rates, Progress())
    assert all((moved[key].abs() <= weights[key].abs()).all() for key in moved), f"{part!r} grows a weight"
    assert all((moved[key] * weights[key] >= 0).all() for key in moved), f"{part!r} changes a sign"
    unchanged = part.off().prox(weights, rates, Progress())
    assert all(torch.equal(unchanged[key], weights[key]) for key in unchanged), f"{part!r} is not off"
    still = part.prox(weights, dict.fromkeys(weights, 0.0), Progress())
    assert all(torch.equal(still[key], weights[key]) for key in still), f"{part!r} moves a weight at learning rate zero"


@contract(DualPenalty)
def a_dual_ascends_without_a_gradient_and_off_stays_at_zero(part: DualPenalty) -> None:
    """For those that ask for nothing but what the sparsifier itself knows."""
    have = {"weights": _values(), "expected_nnz": {"a.weight": torch.tensor(7.0, dtype=torch.float64), "b.weight": torch.tensor(4.0, dtype=torch.float64)}}
    if not {*asks(part.ascend), *asks(part.loss)} <= set(have):
        return
    observed, used = ({name: have[name] for name in asks(method)} for method in (part.ascend, part.loss))
    state = part.start()
    for _ in range(3):
        before = {name: value.clone() for name, value in state.items()}
        after = part.ascend(state, Progress(), **observed)
        assert all(torch.equal(state[name], before[name]) for name in state), f"{part!r} changed its state in place"
        assert set(after) == set(state) and not any(value.requires_grad for value in after.values()), f"{part!r}: a state has other names, or a gradient"
        state = after
    for name, group in used.items():
        for key, value in group.items():
            _slope_is_autograds(lambda v, name=name, key=key: part.loss(state, Progress(), **{**used, name: {**used[name], key: v}}), value, repr(part))  # type: ignore[misc]
    off = part.off()
    nothing = off.ascend(off.start(), Progress(), **observed)
    assert all(float(value) == 0.0 for value in nothing.values()) and float(off.loss(nothing, Progress(), **used)) == 0.0, f"{part!r} is not off"


@contract(ActivationPenalty)
def padding_does_not_count_and_off_is_zero(part: ActivationPenalty) -> None:
    draw = Generator().manual_seed(5)
    x = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64)
    x = x + x.sign() * 0.1
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert part.loss({"a": [x]}, Progress()).shape == (), f"{part!r} is no scalar"
    _slope_is_autograds(lambda v: part.loss({"a": [v]}, Progress(), mask), x, repr(part))
    padded = torch.where(mask[..., None], x, 100.0)
    assert torch.equal(part.loss({"a": [x]}, Progress(), mask), part.loss({"a": [padded]}, Progress(), mask)), f"{part!r} counts padding"
    assert float(part.off().loss({"a": [x]}, Progress())) == 0.0, f"{part!r} is not off"
