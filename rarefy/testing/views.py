"""The contract of a View: pure, its export is what the forward sees, and it survives copies, state dicts and hosts."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from rarefy.core.attach import attach_view, detach, exported
from rarefy.core.roles import View
from rarefy.testing import figures
from rarefy.testing.contract import contract

OUT, IN = 6, 8  # an example of a view is one for a weight of this shape


def _weight() -> Tensor:
    return figures.weight(OUT, IN)


def _disturb(part: View) -> View:
    with torch.no_grad():
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.logical_not_() if tensor.dtype == torch.bool else tensor.add_(1.0)
    return part


def _hosted(part: View) -> tuple[nn.Linear, Tensor]:
    model = nn.Linear(IN, OUT)
    attach_view(model, "weight", copy.deepcopy(part))
    return model, figures.weight(3, IN, seed=7)


@contract(View)
def the_forward_is_pure_and_keeps_shape_and_dtype(part: View) -> None:
    for weight in (_weight(), _weight().bfloat16()):
        before = weight.clone()
        first, again = part(weight), part(weight)
        assert first.shape == weight.shape, f"{part!r} makes {tuple(first.shape)} of {tuple(weight.shape)}"
        assert first.dtype == weight.dtype, f"{part!r} makes {first.dtype} of {weight.dtype}"
        assert torch.equal(first, again), f"{part!r}: two forwards of one weight differ"
        assert torch.equal(weight, before), f"{part!r} changed the weight that it was given"


@contract(View)
def the_raw_weight_gets_a_gradient(part: View) -> None:
    weight = _weight().requires_grad_(True)
    (part(weight) * figures.weight(OUT, IN, seed=3)).sum().backward()
    assert weight.grad is not None, f"{part!r} cuts the raw weight's gradient off"
    assert bool(weight.grad.any()), f"{part!r} gives the raw weight no gradient"
    assert torch.isfinite(weight.grad).all(), f"{part!r}: a gradient that is not finite"


@contract(View)
def an_export_is_what_the_forward_sees(part: View) -> None:
    weight = _weight()
    found = part.export(weight)
    assert torch.equal(found.weight, part(weight).detach()), f"{part!r} exports another weight than the forward sees"
    assert not found.weight.requires_grad, f"{part!r} exports a weight with a graph"
    assert found.mask.dtype == torch.bool, f"{part!r} exports a mask of {found.mask.dtype}"
    assert not bool(found.weight[~found.mask].any()), f"{part!r}: exported weights outside the mask are not zero"


@contract(View)
def a_copy_is_equal_and_independent(part: View) -> None:
    weight = _weight()
    before, twin = part(weight).detach().clone(), copy.deepcopy(part)
    assert torch.equal(twin(weight), before), f"{part!r}: a deep copy sees another weight"
    _disturb(twin)
    assert torch.equal(part(weight), before), f"{part!r} shares tensors with its deep copy"


@contract(View)
def a_state_dict_brings_the_view_back(part: View) -> None:
    weight, other = _weight(), copy.deepcopy(part)
    for tensor in other.parameters():
        tensor.data.add_(1.0)
    other.load_state_dict(part.state_dict())
    assert torch.equal(other(weight), part(weight)), f"{part!r}: a state dict loaded into a copy with other values does not bring its weight back"


@contract(View)
def a_host_keeps_its_keys_copies_and_comes_back_plain(part: View) -> None:
    model, x = _hosted(part)
    plain, y = {"weight", "bias"}, model(x)
    added = set(model.state_dict()) - plain
    assert plain <= set(model.state_dict()), f"{part!r} renames a key of its host"
    assert all(key.startswith("rarefy_weight.") for key in added), f"{part!r} adds keys {sorted(added)}, which must begin with rarefy_weight"
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), y), f"{part!r}: a deep copy of its host computes something else"
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(model(x), y), f"{part!r}: a deep copy of its host shares its weight"
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), y), f"{part!r}: a state dict does not bring its host back"
    with exported(model):
        assert set(model.state_dict()) == plain, f"{part!r}: an exported host has other keys"
        assert torch.equal(model(x), y), f"{part!r}: an exported host computes something else"
    assert torch.equal(model(x), y), f"{part!r} is not back after an export"
    with torch.no_grad():
        model.weight.mul_(-8.0)
    assert not torch.equal(model(x), y), f"{part!r}: its host does not see a changed raw weight"
    assert torch.equal(model(x), nn.functional.linear(x, part(model.weight), model.bias)), f"{part!r}: its host computes something else than its weight"
    detach(model)
    assert type(model) is nn.Linear, f"{part!r}: its host has another class after it was detached"
