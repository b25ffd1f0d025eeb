"""The contract of a Mixture: shares that add up, over tokens and experts that take part, group by group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.core.records import Context, Mix, Slots
from rarefy.core.roles import Mixture
from rarefy.experts.layers.mixed import Mixed, mixed
from rarefy.testing import figures
from rarefy.testing.contract import contract

_GROUPS, _TOKENS, _WIDTH, _EXPERTS = 3, 6, 8, 4
_CUT = 4  # tokens from here on are the future
_VALID = torch.arange(_GROUPS * _TOKENS).view(_GROUPS, _TOKENS) % 4 != 3
_LIVE = torch.tensor([True, False, True, True])


# ---------------------------------------------------------------- figures


def _layer(part: Mixture, experts: int = _EXPERTS) -> Mixed:
    """Its layer, every parameter drawn: some start at zero, where much would hold by itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = mixed(part, _WIDTH, experts, 6)
    for seed, parameter in enumerate(made.parameters()):
        with torch.no_grad():
            parameter.copy_(0.5 * figures.weight(max(1, parameter.numel()), 1, seed=seed).view_as(parameter) + (parameter.dim() < 2))
    return made.eval()


def _tokens(groups: int = _GROUPS, seed: int = 0) -> Tensor:
    return figures.weight(groups * _TOKENS, _WIDTH, seed=seed).view(groups, _TOKENS, _WIDTH)


def _ran(made: Mixed, x: Tensor, **context: Any) -> Tensor:
    """What the layer makes of tokens, with the same draws every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y: Tensor = made(x, Context(**context))
        return y


def _mixture(part: Mixture, x: Tensor, **context: Any) -> Slots | Mix:
    made, seen = _layer(part), Context(**context)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return part(made.affinity(x, seen), seen)


# ---------------------------------------------------------------- checks


@contract(Mixture)
def shares_add_up(part: Mixture) -> None:
    """No share is negative; over what takes part they sum to 1, and what does not has none."""
    for training in (True, False):
        for valid in (None, _VALID):
            for live in (None, _LIVE):
                mixture = _mixture(part, _tokens(), training=training, valid=valid, live=live)
                taking = torch.ones(_GROUPS, _TOKENS, dtype=torch.bool) if valid is None else valid
                alive = torch.ones(_EXPERTS, dtype=torch.bool) if live is None else live
                _slots_add_up(part, mixture, taking, alive) if isinstance(mixture, Slots) else _mix_adds_up(part, mixture, alive)


def _slots_add_up(part: Mixture, mixture: Slots, valid: Tensor, live: Tensor) -> None:
    dispatch, combine = mixture.dispatch, mixture.combine
    assert dispatch.dtype == combine.dtype == torch.float32 and bool((dispatch >= 0).all()) and bool((combine >= 0).all()), f"{part!r} has negative shares"
    assert torch.allclose(dispatch.sum(1), torch.ones(()), atol=1e-5), f"{part!r}: a slot's shares over tokens do not sum to 1"
    assert torch.allclose(combine.sum((2, 3)), valid.float(), atol=1e-5), f"{part!r}: a token's shares over slots do not sum to 1"
    assert not bool(dispatch[~valid].any()) and not bool(combine[:, :, ~live].any()), f"{part!r}: padding or a dead expert has a share"


def _mix_adds_up(part: Mixture, mixture: Mix, live: Tensor) -> None:
    served = mixture.expert < _EXPERTS
    assert bool((mixture.weight >= 0).all()) and torch.allclose(mixture.weight.sum(1), torch.ones(()), atol=1e-5), f"{part!r}: a group's shares do not sum to 1"
    dead = ~live[mixture.expert.clamp(max=_EXPERTS - 1)] | ~served
    assert not bool(mixture.weight[dead].any()), f"{part!r}: a dead expert, or nobody, has a share"


@contract(Mixture)
def without_anybody_live_nothing_comes_out_wrong(part: Mixture) -> None:
    y = _ran(_layer(part), _tokens(), live=torch.zeros(_EXPERTS, dtype=torch.bool), valid=_VALID)
    assert bool(torch.isfinite(y).all()), f"{part!r} makes numbers out of no experts"


@contract(Mixture)
def padding_takes_no_part(part: Mixture) -> None:
    made, x = _layer(part), _tokens()
    y = _ran(made, x, valid=_VALID)
    other = _ran(made, torch.where(_VALID[..., None], x, 100.0), valid=_VALID)
    assert torch.equal(y, other) and not bool(y[~_VALID].any()), f"{part!r}: padding changes other tokens, or gets an output"
    for group, valid in enumerate(_VALID):
        alone = _ran(made, x[group : group + 1, valid])
        assert torch.allclose(alone[0], y[group, valid], atol=1e-5), f"{part!r}: a padded group is not the group without its padding"
    assert bool(torch.isfinite(_ran(made, x, valid=torch.zeros_like(_VALID))).all()), f"{part!r}: a group of padding is not finite"


@contract(Mixture)
def groups_do_not_see_each_other(part: Mixture) -> None:
    made, x = _layer(part), _tokens()
    whole = _ran(made, x)
    for group in range(_GROUPS):
        assert torch.allclose(_ran(made, x[group : group + 1])[0], whole[group], atol=1e-5), f"{part!r}: a group's output depends on its batch"
    assert _ran(made, x[:0]).shape == (0, _TOKENS, _WIDTH), f"{part!r} does not take an empty batch"


@contract(Mixture)
def its_causal_flag_is_true_of_its_layer(part: Mixture) -> None:
    made, x = _layer(part), _tokens()
    for training in (True, False):
        made.train(training)
        later = torch.cat([x[:, :_CUT], _tokens(seed=7)[:, _CUT:]], 1)
        moved = not torch.allclose(_ran(made, x)[:, :_CUT], _ran(made, later)[:, :_CUT], atol=1e-6)
        assert moved is not part.causal(training), f"{part!r} says causal = {part.causal(training)}, and later tokens {'change' if moved else 'never change'} earlier ones"


@contract(Mixture)
def every_parameter_learns_from_the_task(part: Mixture) -> None:
    made = _layer(part).train()
    (_ran(made, _tokens()) * _tokens(seed=3)).sum().backward()
    idle = [name for name, p in made.named_parameters() if p.grad is None or not bool(torch.isfinite(p.grad).all()) or not bool(p.grad.any())]
    assert not idle, f"{part!r}: no gradient for {', '.join(idle)}"


@contract(Mixture)
def it_mixes_in_float32_under_autocast(part: Mixture) -> None:
    made, x = _layer(part), _tokens()
    plain = part(made.affinity(x, Context()), Context())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, y = part(made.affinity(x, Context()), Context()), _ran(made, x)
    pairs = zip(*((m.dispatch, m.combine) if isinstance(m, Slots) else (m.weight,) for m in (plain, cast)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), f"{part!r} does not mix in float32 under autocast"
    assert torch.allclose(y.float(), _ran(made, x), atol=0.1, rtol=0.1), f"{part!r}: its layer is far from itself under autocast"
    assert _ran(made.bfloat16(), x.bfloat16()).dtype == torch.bfloat16, f"{part!r}: bfloat16 in does not give bfloat16 out"
