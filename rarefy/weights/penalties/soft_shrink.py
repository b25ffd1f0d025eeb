"""Soft shrinkage: after every step the weights that a cut would take now lose a share of themselves, and may still recover."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.exact import keep_count, topk_mask
from rarefy.core.records import Paper, Phase, Progress, TrainRecipe
from rarefy.weights.allocations.uniform import Uniform
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.penalties import ProximalPenalty
from rarefy.weights.schedules.constant import Constant
from rarefy.weights.schedules.drops import Drops

PAPER = Paper(
    "iss-p",
    "Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution",
    "arXiv 2303.09650",
    (
        "shrinking takes half of the steps, where the paper counts to about 100,000 iterations, and fine-tuning drops its rate at half and three quarters",
        "each tensor shrinks all but round(density n) weights, and ties keep the lower index; the published code rounds what it shrinks up",
        "unstructured in every tensor alike: the variants n of m and with a threshold from a sample are not here, nor is super-resolution",
    ),
)


@dataclass(frozen=True)
class SoftShrink(ProximalPenalty):
    """Multiply the smallest weights of each tensor, chosen anew after every step of the optimizer; the others stay as they are.

    ``w_i <- (1 - strength) w_i  for all but the round(density n) largest |w|``

    A tensor whose learning rate is 0 is frozen and stays; otherwise the rate plays no part. Gradients and moments are untouched.

    Raises:
        BadInput: a density or a strength outside [0, 1].

    Source: Wang et al., arXiv 2303.09650, the unstructured variant.

    >>> SoftShrink(density=0.5, strength=0.25).prox({"a": torch.tensor([4., -2., 1., 3.])}, {"a": 0.1}, Progress())["a"].tolist()
    [4.0, -1.5, 0.75, 3.0]
    """

    density: float = 0.1
    strength: float = 0.05
    name = "soft-shrink"
    paper = PAPER

    def __post_init__(self) -> None:
        if not (0.0 <= self.density <= 1.0 and 0.0 <= self.strength <= 1.0):
            raise BadInput(f"density {self.density}, strength {self.strength}", "both are fractions in [0, 1]", "pass for example density=0.1, strength=0.05")

    def off(self) -> SoftShrink:
        return replace(self, strength=0.0)

    def prox(self, weights: Mapping[str, Tensor], rates: Mapping[str, float], progress: Progress) -> dict[str, Tensor]:
        return {key: self._shrunk(w.detach()) if rates[key] else w for key, w in weights.items()}

    def _shrunk(self, w: Tensor) -> Tensor:
        return torch.where(topk_mask(w.abs(), keep_count(w.numel(), self.density)), w, w * (1 - self.strength))


def _phases(density: float, steps: int) -> tuple[Phase, ...]:
    """Half of the steps shrink at the constant rate, the rest tune what the cut left."""
    return (
        Phase("shrink", until=(steps + 1) // 2, penalties=(SoftShrink(density),)),
        Phase("fine-tune", density=Constant(density), criterion=Magnitude(), allocation=Uniform(), rate=Drops()),
    )


ISS_P = TrainRecipe("iss-p", _phases, Uniform(), Magnitude(), PAPER)
