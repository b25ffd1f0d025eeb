"""Digits: scikit-learn's 8x8 hand-written digits and a small multilayer perceptron; seconds on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.core.errors import BadInput, MissingExtra
from rarefy.core.roles import Task

_TRAIN = 1347  # of 1797; the rest is held out


@cache
def _data() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as absent:
        raise MissingExtra("sklearn", "tasks") from absent
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]


@dataclass(frozen=True)
class Digits(Task):
    """Classify 64 pixels in [0, 1] into ten digits; split fixed, a batch is a pure function of (seed, step).

    >>> x, y = Digits(rows=4).batch(0, 7); tuple(x.shape), torch.equal(x, Digits(rows=4).batch(0, 7)[0])
    ((4, 64), True)
    """

    width: int = 64
    rows: int = 64
    name = "digits"

    def model(self, seed: int, **options: Any) -> nn.Module:
        """A perceptron 64 - width - width - 10; the caller's random state is left as it was. Option: width.

        Raises:
            BadInput: another option.
        """
        other = sorted(set(options) - {"width"})
        if other:
            raise BadInput(f"option {', '.join(other)} of the task {self.name}", "its model has the option width alone", "leave it out")
        width = int(options.get("width", self.width))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """x [rows, 64], y [rows], drawn with replacement from the training part."""
        x, y = _data()
        rows = torch.randint(_TRAIN, (self.rows,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        return x[rows], y[rows]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy on the 450 held-out digits, in [0, 1]."""
        x, y = _data()
        return {"accuracy": float((model(x[_TRAIN:]).argmax(1) == y[_TRAIN:]).float().mean())}
