"""Digits as sequences of patches, with one layer that mixes experts over a sequence; seconds on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.core.roles import Mixture, Task
from rarefy.core.trace import Trace
from rarefy.experts.auxiliary import auxiliary
from rarefy.experts.layers.mixed import mixed
from rarefy.experts.mixtures.soft_slots import SoftSlots
from rarefy.tasks.digits import Digits
from rarefy.tasks.routed import routed

_PATCHES = 16  # of 2x2 pixels


class PatchClassifier(nn.Module):
    """Embed 16 patches and their places, one mixed layer with a residual, read out ten logits of all patches: [R, 64] -> [R, 10]."""

    def __init__(self, width: int, experts: int, inner: int, choice: Mixture) -> None:
        super().__init__()
        self.embed, self.place, self.read = nn.Linear(4, width), nn.Parameter(torch.randn(_PATCHES, width) / 2), nn.Linear(_PATCHES * width, 10)
        self.norm, self.layer = nn.LayerNorm(width), mixed(choice, width, experts, inner)
        self.balances = choice.balances

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(patches(x)) + self.place
        out: Tensor = self.read((h + self.layer(self.norm(h))).flatten(1))
        return out


def patches(x: Tensor) -> Tensor:
    """Images of 8x8 pixels [R, 64] as 16 patches of 2x2, row by row: [R, 16, 4].

    >>> patches(torch.arange(64.0)[None])[0, :2].tolist()
    [[0.0, 1.0, 8.0, 9.0], [2.0, 3.0, 10.0, 11.0]]
    """
    return x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, _PATCHES, 4)


@dataclass(frozen=True)
class PatchDigits(Task):
    """Classify hand-written digits as sequences of 16 patches; the loss includes the mixture's balance losses.

    `router` names any Mixture, with its hyper-parameters: `soft-slots:slots=4`, `smear`; `inner` is the width within an expert (None: `width`).
    """

    width: int = 32
    experts: int = 4
    inner: int | None = None
    rows: int = 64
    router: str = SoftSlots.name
    name = "patch_digits"

    def model(self, seed: int, **options: Any) -> nn.Module:
        """One mixed layer; the caller's random state is left as it was. Options: width, experts, inner, router.

        Raises:
            BadInput: no such mixture (the sentence lists what there is), one that refuses its hyper-parameters, or another option.
        """
        return routed(self, Mixture, PatchClassifier, seed, options)

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """x [rows, 64], y [rows], drawn with replacement from the training part."""
        return Digits(rows=self.rows).batch(seed, step)

    def loss(self, model: Any, batch: Any) -> Tensor:
        if not model.balances:
            return F.cross_entropy(model(batch[0]), batch[1])
        with Trace(model) as trace:
            loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss + auxiliary(trace.entries, model.balances)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy on the 450 held-out digits, in [0, 1], without noise or dropout."""
        training = model.training
        found = Digits().evaluate(model.eval())
        model.train(training)
        return found
