"""Synthetic weights and statistics for the contracts: small, seeded, made by the discovered Statistic of each name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.core.roles import Statistic
from rarefy.weights.statistics import statistic as measured


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def rows(like: Tensor, seed: int = 1, count: int = 24) -> Tensor:
    """Correlated input rows [R, C] of a site with this weight."""
    columns = like[0].numel()
    made: Tensor = torch.randn(count, columns, generator=seeded(seed)) @ (torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=seeded(seed + 1)) / columns**0.5)
    return made


def gradients(like: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(like.shape, generator=seeded(seed))


SOURCES = {"input": rows, "gradient": gradients, "model": gradients}


def statistic(name: str, like: Tensor, batches: int = 2, seen: Tensor | None = None) -> Tensor:
    """The statistic of this name for a site with this weight: of the input rows `seen` [R, C], or over synthetic batches."""
    part = measured(name)
    if not isinstance(part, Statistic):
        return gradients(like, seed=10)
    state = part.start(like)
    given = [seen] if seen is not None and part.source == "input" else [SOURCES[part.source](like, seed=10 + batch) for batch in range(batches)]
    for batch in given:
        state = part.update(state, batch)
    found: Tensor = part.finish(state)
    return found


def statistics(names: Sequence[str], like: Tensor, seen: Tensor | None = None) -> dict[str, Tensor]:
    return {name: statistic(name, like, seen=seen) for name in names}
