"""Run a bank by a mixture: experts over slots, or one merged expert per group.

Axis legend: G groups of M tokens, E experts of S slots, k merged experts, d width.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Mix, Routing, Slots
from rarefy.core.roles import Bank
from rarefy.experts.dispatch import dispatch
from rarefy.experts.routing import dense


@runtime_checkable
class Mergeable(Protocol):
    """A bank that runs one expert of merged parameters per group: x [G, M, d] -> [G, M, d]."""

    def merged(self, x: Tensor, mix: Mix) -> Tensor: ...


def run(mixed: Slots | Mix, x: Tensor, bank: Bank) -> Tensor:
    """What a bank makes of x [G, M, d] by a mixture, [G, M, d].

    Raises:
        BadInput: the mixture merges, and the bank cannot.
    """
    if isinstance(mixed, Slots):
        return _through_slots(mixed, x, bank)
    if not isinstance(bank, Mergeable):
        raise BadInput(f"{type(bank).__name__} merged", "the bank has no method merged(x, mix)", "use the bank FFN")
    return bank.merged(x, mixed)


def _through_slots(mixed: Slots, x: Tensor, bank: Bank) -> Tensor:
    """``slots = D' x``, each through its expert; ``y = C outputs``."""
    groups, _, experts, slots = mixed.dispatch.shape
    filled = torch.einsum("gmes,gmd->gesd", mixed.dispatch.to(x.dtype), x)
    expert = torch.arange(experts, device=x.device).repeat_interleave(slots).repeat(groups)
    one = Routing(expert, torch.ones_like(expert, dtype=x.dtype), groups * experts * slots, experts, 1)
    out = dispatch(filled.reshape(-1, x.shape[-1]), one, bank)
    return torch.einsum("gmes,gesd->gmd", mixed.combine.to(x.dtype), out.view(groups, experts, slots, x.shape[-1]))


def merge(weight: Tensor, mix: Mix) -> Tensor:
    """One tensor per group: ``sum_k weight_gk W_expert_gk``, W [E, ...] -> [G, ...]; an expert E adds nothing.

    Costs ``G k |W|`` multiply-adds where 2 k < E, else ``G E |W|`` in one product.

    >>> merge(torch.tensor([1.0, 10.0]), Mix(torch.tensor([[0.5, 0.25]]), torch.tensor([[0, 1]]))).tolist()
    [3.0]
    """
    experts, (groups, k) = weight.shape[0], mix.expert.shape
    share = mix.weight.to(weight.dtype)
    if 2 * k < experts:
        share = share.masked_fill(mix.expert >= experts, 0.0).view(groups, k, *[1] * (weight.dim() - 1))
        found = mix.expert.clamp(max=experts - 1)
        return sum((share[:, i] * weight[found[:, i]] for i in range(1, k)), share[:, 0] * weight[found[:, 0]])
    shares = dense(Routing(mix.expert.flatten(), share.flatten(), groups, experts, k))
    return (shares @ weight.flatten(1)).view(groups, *weight.shape[1:]) if weight.dim() > 1 else shares @ weight


def merged_linear(x: Tensor, weight: Tensor, bias: Tensor, mix: Mix) -> Tensor:
    """A linear map of merged weights and biases: x [G, M, I], weight [E, O, I], bias [E, O] -> [G, M, O]."""
    return torch.baddbmm(merge(bias, mix)[:, None], x, merge(weight, mix).transpose(1, 2))
