"""The contract of a Controller: it changes a layer between steps alone, its state is plain, and a resumed run is the same run."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.control import Control
from rarefy.core.discover import methods
from rarefy.core.roles import Choice, Controller, Layer
from rarefy.experts.banks.glu import GLU
from rarefy.experts.moe import MoE
from rarefy.experts.routers.linear import Linear
from rarefy.testing import figures
from rarefy.testing.contract import contract

_WIDTH, _EXPERTS = 8, 4


def _layer(part: Controller) -> nn.Module:
    """A layer, of a router or by itself, that trains with a controller of this class."""
    kinds = [kind for kind in (named() for named in methods(Choice).values()) if any(isinstance(c, type(part)) for c in kind.controllers)]
    made = [kind for kind in (named() for named in methods(Layer).values()) if any(isinstance(c, type(part)) for c in kind.controllers)]
    assert kinds or made, f"{part!r}: no router or layer names it among its controllers"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if not kinds:
            return made[0].make(_WIDTH, _EXPERTS, 6)
        return MoE((kinds[0].affinity or Linear)(_WIDTH, _EXPERTS), kinds[0], (kinds[0].bank or GLU)(_EXPERTS, _WIDTH, 6), kinds[0].overflow)


class _Run:
    """A layer in training under its controller."""

    def __init__(self, part: Controller) -> None:
        self.layer = _layer(part)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.1)
        self.control = Control(self.layer, self.optimizer, (part,))

    def step(self, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.optimizer.zero_grad()
            self.control.loss(self.layer(figures.weight(24, _WIDTH, seed=seed)).square().mean()).backward()
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.layer.state_dict().items()}

    def state(self) -> Any:
        text = json.dumps(self.control.state_dict())
        return json.loads(text)


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@contract(Controller)
def its_state_is_plain_and_a_resumed_run_is_the_same(part: Controller) -> None:
    whole, stopped = _Run(part), _Run(part)
    for seed in range(4):
        whole.step(seed)
        stopped.step(seed)
        try:
            saved = stopped.state()
        except TypeError as error:
            raise AssertionError(f"{part!r}: its state must be plain: {error}") from error
        again = _Run(part)
        again.layer.load_state_dict(stopped.tensors())
        again.control.load_state_dict(saved)
        stopped = again
    assert _equal(whole.tensors(), stopped.tensors()) and whole.state() == stopped.state(), f"{part!r}: a run that was stopped and resumed differs"


@contract(Controller)
def it_acts_between_steps_alone(part: Controller) -> None:
    """Neither a forward nor evaluation changes anything; the same step after evaluation has the same effect."""
    one, other = _Run(part), _Run(part)
    before = other.tensors()
    other.layer.eval()(figures.weight(30, _WIDTH, seed=9))
    other.layer.train()
    assert _equal(before, other.tensors()), f"{part!r} changes the layer in a forward"
    one.step(0)
    other.step(0)
    assert _equal(one.tensors(), other.tensors()) and one.state() == other.state(), f"{part!r} counts rows of evaluation"


@contract(Controller)
def what_it_writes_stays_a_leaf_and_finite(part: Controller) -> None:
    run = _Run(part)
    shapes = {key: value.shape for key, value in run.tensors().items()}
    for seed in range(3):
        run.step(seed)
    assert {key: value.shape for key, value in run.tensors().items()} == shapes, f"{part!r} changes the shape of a tensor"
    assert all(bool(torch.isfinite(value).all()) for value in run.tensors().values()), f"{part!r} leaves what is not finite"
    assert all(p.is_leaf for p in run.layer.parameters()), f"{part!r} writes a parameter outside no_grad"


@contract(Controller)
def a_step_without_rows_is_fine(part: Controller) -> None:
    layers = {"layer": _layer(part).requires_grad_(False)}
    state = part.start(layers)
    assert float(part.loss(state, [])) == 0.0, f"{part!r} adds a loss for no rows"
    assert isinstance(part.after_step(state, layers, [], torch.optim.SGD([torch.zeros(1)], lr=0.1)), dict), f"{part!r} needs entries"
