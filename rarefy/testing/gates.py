"""The contract of a Gate: open without arguments, exact zeros, the density it was set to, the gradient of what it keeps, no state in forward."""

from __future__ import annotations

import copy
import json

import torch
from torch import Tensor

from rarefy.core.roles import Gate
from rarefy.testing import figures
from rarefy.testing.contract import contract

SHAPES = ((1, 1), (5, 7), (2, 3, 16), (0, 4), (9,))


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.int32)


def _calibrated(part: Gate, width: int = 24) -> tuple[Gate, Tensor]:
    rows = figures.weight(64, width)
    gate = copy.deepcopy(part)
    gate.calibrate(rows)
    return gate, rows


@contract(Gate)
def without_arguments_it_is_open_bit_for_bit(part: Gate) -> None:
    for shape in SHAPES:
        x = figures.weight(*shape) if 0 not in shape else torch.zeros(shape)
        x.view(-1)[:4] = torch.tensor([-0.0, float("inf"), float("nan"), 1e-42])[: x.numel()]
        assert torch.equal(_bits(type(part)()(x)), _bits(x)), f"{type(part).__name__}() changes activations of {shape}"


@contract(Gate)
def what_it_keeps_is_unchanged_and_the_rest_is_zero(part: Gate) -> None:
    for shape in SHAPES:
        gate, _ = _calibrated(part, shape[-1])
        x = figures.weight(*shape) if 0 not in shape else torch.zeros(shape)
        kept, y = gate.keep(x), gate(x)
        assert kept.dtype == torch.bool and kept.shape == x.shape and y.shape == x.shape, f"{part!r}: shape {tuple(kept.shape)} of {shape}"
        assert torch.equal(_bits(y)[kept], _bits(x)[kept]) and not bool(_bits(y)[~kept].any()), f"{part!r} is not x where kept and 0 elsewhere at {shape}"
        assert gate(x.to(torch.bfloat16)).dtype == torch.bfloat16, f"{part!r} changes the dtype"


@contract(Gate)
def it_reaches_the_density_it_was_set_to(part: Gate) -> None:
    gate, rows = _calibrated(part)
    wanted, kept = gate.settings()["density"] * rows.numel(), int(gate.keep(rows).sum())
    assert abs(kept - wanted) <= rows.shape[0] / 2, f"{part!r} keeps {kept} of {rows.numel()} where {wanted:.0f} were asked"


@contract(Gate)
def the_gradient_passes_where_it_keeps(part: Gate) -> None:
    gate, rows = _calibrated(part)
    x, upstream = rows.clone().requires_grad_(), figures.weight(*rows.shape, seed=1)
    gate(x).backward(upstream)
    wanted = upstream if gate.straight else upstream * gate.keep(rows)
    assert x.grad is not None and torch.equal(x.grad, wanted), f"{part!r}: the gradient is not the upstream one {'everywhere' if gate.straight else 'where kept and 0 elsewhere'}"


@contract(Gate)
def forward_changes_no_state(part: Gate) -> None:
    gate, rows = _calibrated(part)
    before = {k: v.clone() for k, v in gate.state_dict().items()}
    first, again = gate(rows), gate(rows)
    assert torch.equal(first, again) and all(torch.equal(v, before[k]) for k, v in gate.state_dict().items()), f"{part!r} changes state in forward"


@contract(Gate)
def settings_and_state_build_it_again(part: Gate) -> None:
    gate, rows = _calibrated(part)
    again = type(part)(**json.loads(json.dumps(gate.settings())))
    told = {k for k in gate.state_dict() if k not in gate.stored}
    assert all(torch.equal(again.state_dict()[k], gate.state_dict()[k]) for k in told), f"{part!r}: the settings do not give {sorted(told)}"
    assert gate.stored or torch.equal(again(rows), gate(rows)), f"{part!r} is not rebuilt by {gate.settings()}"
    again.load_state_dict(gate.state_dict())
    assert torch.equal(again(rows), gate(rows)), f"{part!r} is not rebuilt by {gate.settings()} and its state dict"
    loaded = again if gate.stored else copy.deepcopy(part)
    loaded.load_state_dict(gate.state_dict())
    assert torch.equal(loaded(rows), gate(rows)), f"{part!r} is not rebuilt by its state dict"


@contract(Gate)
def nan_stays_visible(part: Gate) -> None:
    gate, rows = _calibrated(part)
    if not bool(gate.keep(rows).any()):
        return
    rows[3, 4] = float("nan")
    assert bool(gate(rows)[3, 4].isnan()), f"{part!r} hides NaN"
