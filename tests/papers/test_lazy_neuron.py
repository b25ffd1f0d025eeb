"""The lazy neuron: half of the units at first, a gradient that lowers them, fewer after training, and k of a token, no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.activations.apply import apply_gating
from rarefy.activations.gates.threshold import Threshold
from rarefy.activations.gates.topk import TopK
from rarefy.activations.gatings.lazy_neuron import LAZY_NEURON
from rarefy.core.attach import detach_gates
from rarefy.core.errors import BadInput
from rarefy.core.records import Gating
from rarefy.probes.activation_sparsity import firing, unit_gradients
from tests.evidence import check

EMERGES = "half of a ReLU's units at initialisation, a positive mean gradient there, and below 35% after training on random labels"
EXACT = "at most k units of every token, dense at k = all bit for bit, and the second matrix's multiply-adds counted as k of d"


def net(act: nn.Module, width: int = 128) -> nn.Sequential:
    """He's initialisation, as for any ReLU net."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, width), act, nn.Linear(width, 10))
    for layer in (model[0], model[2]):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return model


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def emerges(act: nn.Module) -> None:
    model = net(act)
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(4000, 16, generator=generator), torch.randint(10, (4000,), generator=generator)
    before = firing(model, [batch])["1"]
    assert before.density == pytest.approx(0.5, abs=0.03)
    mean, t = unit_gradients(model, batch, loss)["1"]
    assert mean > 0 and t > 5
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    densities = [before.density]
    for step in range(1, 601):
        some = torch.randint(4000, (128,), generator=generator)
        optimizer.zero_grad()
        loss(model, (batch[0][some], batch[1][some])).backward()
        optimizer.step()
        if step % 200 == 0:
            densities.append(firing(model, [batch])["1"].density)
    assert densities == sorted(densities, reverse=True) and densities[-1] < 0.35
    assert firing(model, [batch])["1"].dead < 0.1, "sparse for each token, not dead for all"


class Shifted(nn.Module):
    """A ReLU of x + 3 that is never zero to speak of."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + 3) - 1e-3


@check("lazy-neuron", EMERGES, kind="method")
def test_sparsity_emerges() -> None:
    emerges(nn.ReLU())


@pytest.mark.parametrize("twin", [nn.GELU(), Shifted()], ids=["gelu", "shifted"])
def test_without_a_relu_it_does_not(twin: nn.Module) -> None:
    with pytest.raises(AssertionError):
        emerges(twin)


@torch.no_grad()
def exact(gating: Gating) -> None:
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    x[:3] *= 0.01
    plain, model = net(nn.ReLU()), net(nn.ReLU())
    apply_gating(model, replace(gating, density=1.0), [x], [x])
    assert torch.equal(model(x), plain(x)), "k = all is the ReLU"
    detach_gates(model)
    record = apply_gating(model, replace(gating, density=0.125), [x], [x])
    hidden = model[1](model[0](x))
    assert (hidden != 0).sum(-1).eq(16).all(), "16 of 128 units of every token"
    ranked = F.relu(plain[0](x)).sort(dim=-1, descending=True).values
    assert torch.equal(hidden.sort(dim=-1, descending=True).values[:, :16], ranked[:, :16]), "the largest"
    work = {r["name"]: r["macs_executed"] for r in record["ledger"]["matrices"]}
    assert work == {"0": 16 * 128, "2": 16 * 10} and record["ledger"]["mac_density"] == (16 * 128 + 160) / (16 * 128 + 1280)


class OfTheBatch(TopK):
    """The largest of all tokens together."""

    def keep(self, x: Tensor) -> Tensor:
        return super().keep(x.reshape(1, -1)).view(x.shape)


@check("lazy-neuron", EXACT, kind="method")
def test_topk_is_exact() -> None:
    exact(LAZY_NEURON)


@pytest.mark.parametrize("gate", [OfTheBatch, Threshold])
def test_of_the_batch_or_by_a_threshold_it_is_not(gate: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError):
        exact(replace(LAZY_NEURON, parts=((LAZY_NEURON.parts[0][0], gate),)))


def test_few_positives_leave_zeros_and_a_model_without_units_is_refused() -> None:
    gate = TopK(0.5)
    assert gate(F.relu(torch.tensor([[3.0, -1.0, -2.0, -5.0]]))).tolist() == [[3.0, 0.0, 0.0, 0.0]]
    with pytest.raises(BadInput, match="no MLP"):
        firing(nn.Linear(2, 2), [torch.ones(1, 2)])
    with pytest.raises(BadInput, match="none of its places"):
        apply_gating(nn.Linear(2, 2), LAZY_NEURON, [torch.ones(1, 2)], [torch.ones(1, 2)])
