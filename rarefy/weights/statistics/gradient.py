"""What the loss says about a weight: the mean gradient, and the mean squared gradient, streamed over batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.roles import Statistic


def _zero_sum(weight: Tensor) -> dict[str, Tensor]:
    return {"sum": torch.zeros(weight.shape, device=weight.device), "batches": torch.zeros((), device=weight.device)}


def _mean(state: dict[str, Tensor]) -> Tensor:
    return state["sum"] / state["batches"].clamp(min=1.0)


@dataclass(frozen=True)
class Gradient(Statistic):
    """The gradient of the loss, averaged over calibration batches.

    ``g = 1/B sum_b dL_b/dw``; `finish` gives float32 of the weight's shape, loss units per weight unit; 0 without batches.

    >>> s = Gradient(); state = s.start(torch.zeros(1, 2))
    >>> for seen in (torch.tensor([[1., 2.]]), torch.tensor([[3., -2.]])): state = s.update(state, seen)
    >>> s.finish(state).tolist()
    [[2.0, 0.0]]
    """

    name = "gradient"
    source = "gradient"

    def start(self, weight: Tensor) -> dict[str, Tensor]:
        return _zero_sum(weight)

    def update(self, state: dict[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
        return {"sum": state["sum"] + seen.float(), "batches": state["batches"] + 1}

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        return _mean(state)


@dataclass(frozen=True)
class GradientSquare(Statistic):
    """The squared gradient of the batch loss, averaged over calibration batches.

    ``f = 1/B sum_b (dL_b/dw)^2``; `finish` gives float32 of the weight's shape; 0 without batches.

    With one sample a batch and the negative log-likelihood as the loss this is the diagonal of the empirical Fisher
    matrix. With larger batches it squares the batch's mean gradient, which is smaller: use small batches.

    >>> s = GradientSquare(); state = s.start(torch.zeros(1, 2))
    >>> for seen in (torch.tensor([[1., 2.]]), torch.tensor([[3., -2.]])): state = s.update(state, seen)
    >>> s.finish(state).tolist()
    [[5.0, 4.0]]
    """

    name = "gradient_square"
    source = "gradient"

    def start(self, weight: Tensor) -> dict[str, Tensor]:
        return _zero_sum(weight)

    def update(self, state: dict[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
        return {"sum": state["sum"] + seen.float().square(), "batches": state["batches"] + 1}

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        return _mean(state)
