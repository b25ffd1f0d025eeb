"""Soft slots: every expert's slots take a mean of all tokens, and every token a mean of all slots' outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Scores, Slots
from rarefy.core.roles import Mixture


def unit(x: Tensor, dim: int) -> Tensor:
    """x over its length along an axis; a zero vector stays one.

    >>> [round(v, 3) for v in unit(torch.tensor([3.0, 4.0]), 0).tolist()]
    [0.6, 0.8]
    """
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True) + 1e-6)


class SlotCosine(nn.Module):
    """Score every token for every slot by angle: ``logits_mes = scale * cos(x_m, phi_es)``, in float32.

    x [G, M, d] -> Scores of logits [G, M, E, S]; phi [d, E, S] and the scale are learned, the scale from 1. In training N(0, 1) `noise` is
    added. Source: Puigcerver et al., arXiv 2308.00951, and its code google-research/vmoe (soft_moe/router.py).
    """

    def __init__(self, width: int, experts: int, *, slots: int, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise
        self.phi, self.scale = nn.Parameter(torch.randn(width, experts, slots) / width**0.5), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, context: Context) -> Scores:
        with torch.autocast(x.device.type, enabled=False):
            logits = torch.einsum("gmd,des->gmes", unit(x.float(), -1), self.scale.float() * unit(self.phi.float(), 0))
            if self.noise and context.training:
                logits = logits + self.noise * torch.randn_like(logits)
            return Scores(logits)


def shares(logits: Tensor, taking: Tensor | None, dim: int) -> Tensor:
    """Softmax along an axis over those that take part (`taking` broadcasts, False: share 0); 0 for all where none does."""
    if taking is None:
        return logits.softmax(dim)
    return logits.masked_fill(~taking, torch.finfo(logits.dtype).min).softmax(dim) * taking


@dataclass(frozen=True)
class SoftSlots(Mixture):
    """Mix tokens into slots and slots into tokens: ``D = softmax over tokens``, ``C = softmax over all slots``, ``y = C f(D' x)``.

    Scores with logits [G, M, E, S] -> Slots: for each of an expert's S slots a mean of its group's tokens, for each token a mean of all
    slots' outputs. Nothing is dropped and there is no balance loss; groups do not see each other. The cost is that of E S rows per group,
    whatever E: `slots` = round(M / E) costs what one expert for every token costs, and 1 with many experts was best. Each token sees
    the later ones, so that it is for encoders. Source: Puigcerver et al., Soft MoE, arXiv 2308.00951, and its code google-research/vmoe.

    Raises:
        BadInput: no slots, or negative noise.

    >>> made = SoftSlots()(Scores(torch.zeros(1, 4, 2, 1)), Context())
    >>> made.dispatch[0, 0].tolist(), made.combine[0, 0].tolist()
    ([[0.25], [0.25]], [[0.5], [0.5]])
    """

    name = "soft-slots"
    paper = Paper(
        "soft-moe",
        "From Sparse to Soft Mixtures of Experts",
        "arXiv 2308.00951",
        (
            "the equations were read in the authors' code alone (google-research/vmoe), not in the paper",
            "padding, which has no share, and experts that are not live have no counterpart in the authors' code",
            "how many slots an expert has is fixed with the layer, not derived from the number of tokens",
            "experts are gated, where the paper's have two layers; ablations that fix one of the two means, and reports of similarity, are not built in",
            "its vision transformers were not trained",
        ),
    )
    slots: int = 1
    noise: float = 0.0

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(), cls(3), cls(2, 0.5))

    def __post_init__(self) -> None:
        if self.slots < 1 or self.noise < 0:
            raise BadInput(f"{self!r}", "an expert has a slot or more, and noise is not negative")

    def affinity(self, width: int, experts: int, /) -> nn.Module:
        return SlotCosine(width, experts, slots=self.slots, noise=self.noise)

    def __call__(self, scores: Scores, context: Context) -> Slots:
        logits, slots = scores.logits, scores.logits.shape[-1]
        valid = None if context.valid is None else context.valid[:, :, None, None]
        live = None if context.live is None else context.live.repeat_interleave(slots)
        combine = shares(logits.flatten(2), live, -1).view_as(logits)
        return Slots(shares(logits, valid, 1), combine if valid is None else combine * valid)
