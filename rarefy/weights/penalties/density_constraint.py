"""Density constraint: a multiplier that grows until the expected density is what was asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rarefy.core.records import Paper, Progress
from rarefy.weights.penalties import DualPenalty

PAPER = Paper(
    "controlled-sparsity",
    "Controlled Sparsity via Constrained Optimization or: How I Learned to Stop Tuning Penalties and Love Constraints",
    "arXiv 2208.04425",
    ("one constraint on the whole model; the paper also has one for each layer", "a weight is a gate of its own; the paper gates whole units and weighs them by their parameters"),
)


@dataclass(frozen=True)
class DensityConstraint(DualPenalty):
    """Train under ``expected density <= target`` instead of tuning the weight of a penalty.

    ``min_theta max_{m >= 0} L + m (d - target),  d = sum expected_nnz / size``
    ``m <- m + rate (d - target) where d > target, else 0`` (the dual restart), then the loss is ``m (d - target)``

    Args:
        target: expected fraction of open gates.
        rate: dual learning rate.
        size: gates in all; a view's `expected_nnz` is a number of them.

    `ascend` and `loss` take expected_nnz {key: scalar}, of views such as HardConcrete.

    Source: Gallego-Posada et al., arXiv 2208.04425: the min-max problem of section 3 and its dual restarts.

    >>> part, seen = DensityConstraint(target=0.25, rate=2.0, size=8), {"a": torch.tensor(6.)}
    >>> state = part.ascend(part.start(), Progress(), expected_nnz=seen); state
    {'multiplier': tensor(1.)}
    >>> float(part.loss(state, Progress(), expected_nnz=seen))
    0.5
    """

    target: float = 0.1
    rate: float = 1e-2
    size: int = 1
    name = "density-constraint"
    paper = PAPER

    def off(self) -> DensityConstraint:
        return replace(self, rate=0.0)

    def start(self) -> dict[str, Tensor]:
        return {"multiplier": torch.zeros(())}

    def _excess(self, expected_nnz: Mapping[str, Tensor]) -> Tensor:
        return torch.stack(list(expected_nnz.values())).sum() / self.size - self.target

    def ascend(self, state: Mapping[str, Tensor], progress: Progress, *, expected_nnz: Mapping[str, Tensor]) -> dict[str, Tensor]:
        excess = self._excess(expected_nnz).detach().cpu().float()
        return {"multiplier": torch.where(excess > 0, state["multiplier"] + self.rate * excess, 0.0)}

    def loss(self, state: Mapping[str, Tensor], progress: Progress, *, expected_nnz: Mapping[str, Tensor]) -> Tensor:
        excess = self._excess(expected_nnz)
        return state["multiplier"].to(excess) * excess
