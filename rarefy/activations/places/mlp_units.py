"""MLP units: what an activation function returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rarefy.activations.watch import mlps
from rarefy.core.attach import OUTPUT
from rarefy.core.roles import Places


@dataclass(frozen=True)
class MlpUnits(Places):
    """The output of every MLP's activation function: a zero there lets the rows of `up` and the columns of `down` be skipped."""

    name: ClassVar[str] = "mlp-units"

    def find(self, model: nn.Module, batch: Any) -> tuple[str, ...]:
        return tuple(mlp.act + OUTPUT for mlp in mlps(model, batch))
