"""Irrelevance decay: weight decay where the loss does not notice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rarefy.core.records import Paper, Progress
from rarefy.weights.penalties import GradientPenalty


@dataclass(frozen=True)
class IrrelevanceDecay(GradientPenalty):
    """Decay a weight by how little the loss of this batch depends on it.

    ``g <- g + strength * I(g) * w,  I(g) = exp(-|g|)``: the gradient of strength / 2 * sum I w^2 with I held constant

    `edit` takes and returns gradients of the weights' shapes; I lies in (0, 1] and is 1 where the gradient is 0. The
    gradients are those of the mean loss: under a scaler unscale them first.

    Source: Regularization-based Pruning of Irrelevant Weights in Deep Neural Architectures, arXiv 2204.04977; the
    formula is the card's, from memory. The paper decays beside the optimizer's step, w <- w - strength I w; here the
    decay passes through the optimizer, so that plain SGD scales it by the learning rate.

    >>> IrrelevanceDecay(0.5).edit({"a": torch.tensor([2., 2.])}, {"a": torch.tensor([0., 50.])}, {}, Progress())["a"].tolist()
    [1.0, 50.0]
    """

    strength: float = 1e-4
    name = "irrelevance-decay"
    paper = Paper(
        "irrelevance-decay",
        "Regularization-based Pruning of Irrelevant Weights in Deep Neural Architectures",
        "arXiv 2204.04977",
        (
            "the decay passes through the optimizer instead of standing beside its step",
            "only the regulariser: the pruning loop with a performance floor and its roll-back are not here",
        ),
    )

    def off(self) -> IrrelevanceDecay:
        return replace(self, strength=0.0)

    def edit(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], support: Mapping[str, Tensor], progress: Progress) -> dict[str, Tensor]:
        return {key: g + self.strength * torch.exp(-g.abs()) * weights[key].detach() for key, g in gradients.items()}
