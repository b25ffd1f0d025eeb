"""L1: in the loss, or as the proximal step that reaches exact zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rarefy.core.records import Progress
from rarefy.weights.penalties import LossPenalty, ProximalPenalty


@dataclass(frozen=True)
class L1(LossPenalty):
    """``strength * sum |w|``

    >>> float(L1(0.5).loss({"a": torch.tensor([1., -3.])}, Progress()))
    2.0
    """

    strength: float = 1e-4
    name = "l1"

    def off(self) -> L1:
        return replace(self, strength=0.0)

    def loss(self, weights: Mapping[str, Tensor], progress: Progress) -> Tensor:
        return self.strength * torch.stack([w.abs().sum() for w in weights.values()]).sum()


@dataclass(frozen=True)
class ProximalL1(ProximalPenalty):
    """``w <- sign(w) relu(|w| - rate * strength)``, rate the optimizer's learning rate for that tensor.

    >>> ProximalL1(1.0).prox({"a": torch.tensor([2., -0.25])}, {"a": 0.5}, Progress())["a"].tolist()
    [1.5, -0.0]
    """

    strength: float = 1e-4
    name = "proximal-l1"

    def off(self) -> ProximalL1:
        return replace(self, strength=0.0)

    def prox(self, weights: Mapping[str, Tensor], rates: Mapping[str, float], progress: Progress) -> dict[str, Tensor]:
        return {k: torch.sign(w) * torch.relu(w.abs() - rates[k] * self.strength) for k, w in weights.items()}
