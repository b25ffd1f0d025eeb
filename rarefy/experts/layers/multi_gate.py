"""Several gates over one bank, as in multi-task learning: each task mixes the shared experts in its own way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rarefy.core.records import Context, Routing, Scores
from rarefy.core.roles import Affinity, Bank
from rarefy.experts.moe import MoE


class MultiGate(nn.Module):
    """Route the same rows once per gate: x [..., d] -> [T, ..., d] for T affinities, all choosing alike from one bank.

    Each gate is a routed layer of its own (`gates.t`), seen by a `Trace` as such; a state dict names the one bank under each.
    An expert that several tasks use on a row runs once for each. Source: Hazimeh et al., arXiv 2106.03760, section 2 (multi-gate mixture).

    >>> from rarefy.experts.banks.glu import GLU
    >>> from rarefy.experts.routers.smooth_selectors import DSelect, StaticSelectors
    >>> layer = MultiGate([StaticSelectors(6, 4) for _ in range(3)], DSelect(), GLU(4, 6, 5))
    >>> layer(torch.randn(2, 7, 6)).shape
    torch.Size([3, 2, 7, 6])
    """

    def __init__(self, affinities: Sequence[Affinity], choice: Callable[[Scores, Context], Routing], bank: Bank) -> None:
        super().__init__()
        self.gates = nn.ModuleList(MoE(affinity, choice, bank) for affinity in affinities)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        return torch.stack([gate(x, context) for gate in self.gates])
