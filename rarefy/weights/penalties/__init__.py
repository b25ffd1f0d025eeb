"""Pressure towards zero, one idea per file; the kinds of penalty."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from rarefy.core.records import Progress
from rarefy.core.roles import Penalty


class LossPenalty(Penalty):
    """Added to the task's loss."""

    @abstractmethod
    def loss(self, weights: Mapping[str, Tensor], progress: Progress) -> Tensor: ...


class ProximalPenalty(Penalty):
    """Applied to the values after the optimizer's step, with the learning rate of each tensor."""

    @abstractmethod
    def prox(self, weights: Mapping[str, Tensor], rates: Mapping[str, float], progress: Progress) -> dict[str, Tensor]: ...
