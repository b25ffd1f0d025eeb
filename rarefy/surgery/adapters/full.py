"""Full: every kept weight learns, every zero stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from rarefy.core.roles import View
from rarefy.surgery.adapters import Adaptation, added


class Shift(View):
    """A learned change of every kept weight.

    ``W' = W + D`` where W is not zero; D float32 [O, I], zero at the start. Where W is zero, D gets no gradient: neither
    momentum nor decay can move it, and W' would not see it if they did. Decay of D pulls towards W, not towards zero.

    >>> view = Shift(torch.zeros(1, 2)); view(torch.tensor([[0.0, 2.0]])).tolist()
    [[0.0, 2.0]]
    """

    @classmethod
    def examples(cls) -> tuple[Shift, ...]:
        return (cls(torch.arange(48.0).view(6, 8) / 48), cls(torch.zeros(6, 8)))

    def __init__(self, change: Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(change)

    def forward(self, weight: Tensor) -> Tensor:
        return added(weight, self.change)


@dataclass(frozen=True)
class Full(Adaptation):
    """Train all kept weights of the sparse matrices, masked."""

    lr: float = 5e-5
    name = "full"

    def view(self, weight: Tensor, *, generator: Generator) -> Shift:
        return Shift(torch.zeros(weight.shape, device=weight.device))
