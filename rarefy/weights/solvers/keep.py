"""Keep: the mask-only solver. What is kept keeps its value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from rarefy.core.records import Pruned
from rarefy.core.roles import Criterion, Pattern, Solver, asks


@dataclass(frozen=True)
class Keep(Solver):
    """Keep the best-rated weights unchanged and zero the rest.

    ``mask = pattern(criterion(w)), w' = w * mask``

    >>> from rarefy.weights.criteria.magnitude import Magnitude
    >>> from rarefy.weights.patterns.unstructured import PerMatrix
    >>> w = {"a": torch.tensor([[1., -3.]])}
    >>> Keep(Magnitude()).solve(w, {"a": 1}, stats={}, pattern=PerMatrix())["a"].weight.tolist()
    [[0.0, -3.0]]
    """

    criterion: Criterion
    name = "keep"

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        from rarefy.core.discover import methods

        return tuple(cls(e) for kind in methods(Criterion).values() for e in kind.examples())

    @property
    def needs(self) -> tuple[str, ...]:
        return asks(self.criterion.scores)

    def solve(
        self,
        weights: Mapping[str, Tensor],
        budget: Mapping[str, int],
        *,
        stats: Mapping[str, Mapping[str, Tensor]],
        pattern: Pattern,
        bound: Mapping[str, Tensor] | None = None,
        generator: Generator | None = None,
    ) -> dict[str, Pruned]:
        pruned = {}
        for name, weight in weights.items():
            scores = self.criterion.scores(weight, generator=generator, **{s: stats[s][name] for s in self.needs})
            mask = pattern.mask(scores, budget[name], None if bound is None else bound.get(name))
            # where, not a product: a NaN or -0.0 must not survive in a pruned place.
            pruned[name] = Pruned(torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device)), mask)
        return pruned
