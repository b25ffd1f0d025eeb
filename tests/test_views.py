"""Views: export equals forward, keys are only added, tied weights, deepcopy, compile, checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rarefy.core.attach import attach_view, detach, exported
from rarefy.core.errors import BadInput, Refused
from rarefy.weights.views.laid import Laid
from rarefy.weights.views.masked import Masked
from rarefy.weights.views.soft_threshold import SoftThreshold

HOSTS = {
    "linear": (lambda: nn.Linear(4, 3), "weight", lambda: torch.randn(2, 4)),
    "conv": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), "weight", lambda: torch.randn(1, 2, 5, 5)),
    "embedding": (lambda: nn.Embedding(5, 4), "weight", lambda: torch.tensor([1, 3])),
    "layer norm (shadow)": (lambda: nn.LayerNorm(4), "weight", lambda: torch.randn(2, 4)),
}
VIEWS = {
    "masked": lambda w: Masked(torch.arange(w.numel()).view(w.shape) % 2 == 0),
    "soft": lambda w: SoftThreshold(-1.0),
    "laid": lambda w: Laid(torch.arange(w.numel()).view(w.shape) % 2 == 0),
}


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("host", HOSTS)
def test_forward_equals_export_and_the_raw_weight_survives(host, kind):
    make, key, data = HOSTS[host]
    model, x = make(), data()
    keys, cls, plain = set(model.state_dict()), type(model), model(x)
    view = VIEWS[kind](model.weight)
    attach_view(model, key, view)
    raw, out = model._parameters["weight"].clone(), model(x)
    assert not torch.equal(out, plain)
    assert keys <= set(model.state_dict())
    assert all(k.startswith("rarefy_weight.") for k in set(model.state_dict()) - keys)
    with exported(model):
        assert type(model) is cls
        assert set(model.state_dict()) == keys
        assert torch.equal(model(x), out)
    assert torch.equal(model._parameters["weight"], raw)
    assert torch.equal(copy.deepcopy(model)(x), out)
    assert torch.equal(model(x), out)
    detach(model)
    assert torch.equal(model(x), plain)


def tied():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    return model


def test_a_view_belongs_to_the_tensor():
    model, x = tied(), torch.tensor([0, 2])
    w = model[0].weight.detach().clone()
    mask = torch.arange(24).view(6, 4) % 3 > 0
    attach_view(model, "0.weight", Masked(mask))
    assert torch.allclose(model(x), (w * mask)[x] @ (w * mask).t())
    with pytest.raises(Refused):
        attach_view(model, "1.weight", Masked(mask))
    twin = copy.deepcopy(model)
    twin[0].rarefy_weight.mask.zero_()
    assert (twin(x) == 0).all()
    assert (model(x) != 0).any()


def test_compile_and_checkpoint_see_the_view_and_its_gradient():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4)
    attach_view(model, "0.weight", SoftThreshold(-2.0))
    want = model(x)
    want.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    for forward in (lambda: torch.compile(model, backend="aot_eager", fullgraph=True)(x), lambda: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        got = forward()
        got.sum().backward()
        assert torch.allclose(got, want)
        assert all(torch.allclose(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))


def test_an_unknown_key_is_named():
    with pytest.raises(BadInput, match="nope"):
        attach_view(nn.Linear(2, 2), "nope", SoftThreshold())
