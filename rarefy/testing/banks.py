"""The contract of a Bank: its experts are functions of a row alone, and every way to run them is the loop over them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rarefy.core.records import Routing
from rarefy.core.roles import Bank
from rarefy.experts.dispatch import batched, dispatch, fused, gather, is_grouped, loop
from rarefy.testing import figures
from rarefy.testing.contract import contract

_WIDTH = 8


def _drawn(part: Bank) -> Bank:
    """A copy whose parameters are all drawn: some start at zero, where much would hold by itself."""
    made = copy.deepcopy(part).eval()
    for seed, parameter in enumerate(made.parameters()):
        with torch.no_grad():
            parameter.copy_(0.3 * figures.weight(*parameter.shape, seed=seed))
    return made


def _routing(experts: int) -> Routing:
    """Two assignments per row, some to nobody and none to the last expert but where there is one alone."""
    expert = torch.arange(18).remainder(max(1, experts - 1)).where(torch.arange(18) % 5 != 4, experts)
    return Routing(expert, figures.weight(18, seed=4).masked_fill(expert == experts, 0.0), 9, experts, 2)


def _ran(bank: Bank, backend: Callable[..., Tensor]) -> list[Tensor]:
    """The layer's output and the gradients of its rows and of every parameter."""
    made, x = copy.deepcopy(bank), figures.weight(9, _WIDTH, seed=5).requires_grad_()
    y = dispatch(x, _routing(bank.experts), made, backend=backend)
    y.square().sum().backward()
    return [y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in (x, *made.parameters()))]


@contract(Bank)
def every_back_end_is_the_loop(part: Bank) -> None:
    made = _drawn(part)
    want = _ran(made, loop)
    for backend in (gather, *([fused, batched] if is_grouped(made) else [])):
        for one, other in zip(_ran(made, backend), want, strict=True):
            assert torch.allclose(one, other, atol=1e-5, rtol=1e-4), f"{type(part).__name__} runs otherwise by {backend.__name__} than expert by expert"
    with torch.no_grad():  # where it may be native
        y = dispatch(figures.weight(9, _WIDTH, seed=5), _routing(made.experts), made)
    assert torch.allclose(y, want[0], atol=1e-5, rtol=1e-4), f"{type(part).__name__} runs otherwise without gradients than expert by expert"


@contract(Bank)
def a_row_is_served_alone(part: Bank) -> None:
    made, x = _drawn(part), figures.weight(6, _WIDTH)
    assert len(made.split()) == made.experts, f"{type(part).__name__} has {made.experts} experts and splits into {len(made.split())}"
    for e, expert in enumerate(made.split()):
        whole = expert(x)
        assert whole.shape == x.shape and torch.allclose(torch.cat([expert(row) for row in x.split(1)]), whole, atol=1e-5), f"{type(part).__name__}: expert {e} mixes rows"
        assert expert(x[:0]).shape == (0, _WIDTH), f"{type(part).__name__}: expert {e} does not take an empty batch"


@contract(Bank)
def experts_are_their_own(part: Bank) -> None:
    """No two experts compute alike, and every parameter serves some expert."""
    made, x = _drawn(part), figures.weight(6, _WIDTH)
    outs = [expert(x) for expert in made.split()]
    assert all(not torch.allclose(a, b) for i, a in enumerate(outs) for b in outs[:i]), f"{type(part).__name__}: two experts are the same function"
    torch.stack([(out * figures.weight(*out.shape, seed=e)).sum() for e, out in enumerate(outs)]).sum().backward()
    idle = [name for name, p in made.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not idle, f"{type(part).__name__}: no gradient for {', '.join(idle)}"


@contract(Bank)
def copies_compute_alike(part: Bank) -> None:
    made, x = _drawn(part), figures.weight(6, _WIDTH)
    loaded: Any = copy.deepcopy(part).eval()
    loaded.load_state_dict(made.state_dict())
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), loaded):
        assert all(torch.equal(a(x), b(x)) for a, b in zip(other.split(), made.split(), strict=True)), f"{type(part).__name__} does not survive a copy or its state dict"
