"""Inputs on which every linear kernel must equal its reference: odd shapes, empty rows, full rows, no batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor

SHAPES = ((1, 1), (7, 13), (3, 64), (16, 31), (33, 127), (64, 200), (5, 1000))
BATCHES = (0, 1, 2, 3, 5, 8, 11)
DENSITIES = (0.03, 0.5, 1.0)


def samples(seed: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(weight [O, I] with zeros, x [B, I], bias [O] or None)."""
    generator = Generator().manual_seed(seed)
    for rows, columns in SHAPES:
        for number, density in enumerate(DENSITIES):
            weight = torch.randn(rows, columns, generator=generator)
            weight *= torch.rand(rows, columns, generator=generator) < density
            weight[rows // 2] *= 0 if number == 0 else 1
            weight[0, 0] = 1.0  # something is always stored
            for batch in BATCHES:
                bias = torch.randn(rows, generator=generator) if batch % 2 else None
                yield weight, torch.randn(batch, columns, generator=generator), bias
