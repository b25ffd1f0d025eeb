"""Arriving digits: the digits come in mega-batches, one after the other, and training goes on through all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import BadInput
from rarefy.core.roles import Task
from rarefy.tasks.digits import _TRAIN, Digits, _data


@dataclass(frozen=True)
class ArrivingDigits(Task):
    """The task `digits`, of whose training part a further `1 / megabatches` arrives every so many steps.

    A batch of a step is drawn from all that has arrived by then or, without `replay`, from the last mega-batch alone.

    Raises:
        BadInput: no mega-batch, or no step between two.

    >>> task = ArrivingDigits(megabatches=3, every=10)
    >>> task.arrivals(1000), task.batch(0, 7)[0].shape
    ((10, 20), torch.Size([64, 64]))
    """

    megabatches: int = 6
    every: int = 50
    replay: bool = True
    share: float = 0.2
    width: int = 64
    rows: int = 64
    name = "arriving_digits"

    def __post_init__(self) -> None:
        if not 1 <= self.megabatches <= _TRAIN or self.every < 1:
            raise BadInput(f"{self.megabatches} mega-batches every {self.every} steps", f"there are 1 to {_TRAIN} mega-batches, a step or more apart")

    def model(self, seed: int, **options: Any) -> nn.Module:
        return Digits(self.width).model(seed, **options)

    def arrivals(self, steps: int) -> tuple[int, ...]:
        return tuple(range(self.every, min(steps, self.every * self.megabatches), self.every))

    def arrived(self, seed: int, step: int) -> Sequence[tuple[Tensor, Tensor]]:
        """One batch: a random `share` of the mega-batch that is the last at this step."""
        low, high = self._range(step)
        order = low + torch.randperm(high - low, generator=torch.Generator().manual_seed(seed * 1_000_003 - 1 - step // self.every))
        x, y = _data()
        chosen = order[: max(1, round(self.share * (high - low)))]
        return [(x[chosen], y[chosen])]

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """x [rows, 64], y [rows], drawn with replacement from what has arrived."""
        x, y = _data()
        low, high = self._range(step)
        rows = torch.randint(0 if self.replay else low, high, (self.rows,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        return x[rows], y[rows]

    def _range(self, step: int) -> tuple[int, int]:
        """Where the last mega-batch at a step lies in the training part."""
        last = min(step // self.every, self.megabatches - 1)
        return last * _TRAIN // self.megabatches, (last + 1) * _TRAIN // self.megabatches

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return Digits().loss(model, batch)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy on the 450 held-out digits, and how many of them are wrong."""
        accuracy = Digits().evaluate(model)["accuracy"]
        return {"accuracy": accuracy, "errors": float(round((1 - accuracy) * (len(_data()[1]) - _TRAIN)))}
