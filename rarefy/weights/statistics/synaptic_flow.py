"""Synaptic flow: what passes from end to end through every weight, without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rarefy.core.errors import BadInput
from rarefy.core.modes import evaluating
from rarefy.core.records import Site
from rarefy.core.roles import ModelStatistic


@dataclass(frozen=True)
class SynapticFlow(ModelStatistic):
    """The gradient over the moduli of the weights of the sum of all outputs, where every weight is its modulus and every input is one.

    ``f = dR/d|w|,  R = 1^T model(1; |w|)``; for fully connected layers ``R = 1^T |W_L| ... |W_1| 1``

    `collect` gives float32 of each site's shape, at least 0. Only the shape of the first batch's rows is used. All
    parameters and buffers take their moduli, biases are zero, as they are at the paper's initialisation (else later layers
    would be fed what no earlier weight carried, and the earlier ones emptied), the model is in evaluation mode and
    computes in float64: depth multiplies, and float32 would overflow.

    Raises:
        BadInput: the first batch's inputs are not real numbers (token ids have no one), the model has a non-linearity that
            loses what is positive, or the flow is not finite.

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1., -2.]])), model[2].weight.data.fill_(-3.0)
    >>> site = Site("0.weight", "0", "weight", (1, 2))
    >>> SynapticFlow().collect(model, [site], [torch.zeros(4, 2)], lambda m, b: m(b).sum())["0.weight"].tolist()
    [[3.0, 3.0]]
    """

    name = "synaptic_flow"

    def collect(self, model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor]) -> dict[str, Tensor]:
        ones = _ones_like(batches[0])
        moduli = {name: _modulus(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
        moduli |= {name: torch.zeros_like(t) for name, t in moduli.items() if name.rpartition(".")[2] == "bias"}
        keys = sorted({s.key for s in sites})
        weights = [moduli[key].requires_grad_(True) for key in keys]
        with evaluating(model), torch.enable_grad():
            flow = functional_call(model, moduli, (ones,)).sum()
            found = dict(zip(keys, torch.autograd.grad(flow, weights, allow_unused=True), strict=True))
        values = {s.name: s.read(torch.zeros_like(moduli[s.key]) if found[s.key] is None else found[s.key]).float() for s in sites}
        bad = [name for name, value in values.items() if not torch.isfinite(value).all() or bool((value < 0).any())]
        if bad:
            raise BadInput(f"the synaptic flow through {', '.join(bad)}", "a flow is finite and at least 0, which ReLU networks keep", "choose a criterion that uses data")
        return values


def _modulus(tensor: Tensor) -> Tensor:
    value = tensor.detach()
    return value.abs().double() if value.is_floating_point() else value.clone()


def _ones_like(batch: Any) -> Tensor:
    """One input of ones, the shape of a row of the batch."""
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(first, Tensor) or not first.is_floating_point():
        what = f"{first.dtype} inputs" if isinstance(first, Tensor) else f"a batch of type {type(first).__name__}"
        raise BadInput(what, "synaptic flow sends ones in place of real inputs", "choose a criterion that uses data")
    return torch.ones_like(first[:1], dtype=torch.float64)
