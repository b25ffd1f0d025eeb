"""Attention ends: what the query and the output matrix read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rarefy.activations.watch import is_matrix, watch
from rarefy.core.roles import Places


@dataclass(frozen=True)
class AttentionEnds(Places):
    """The inputs of q and o: where three matrices beside one another read one tensor, the first that is called, and the one that is left.

    Fused q, k and v are left alone: k and v stay dense.
    """

    name: ClassVar[str] = "attention-ends"

    def find(self, model: nn.Module, batch: Any) -> tuple[str, ...]:
        found: list[str] = []
        beside: dict[str, list[Any]] = {}
        for seen in watch(model, batch):
            if is_matrix(model.get_submodule(seen.path)):
                beside.setdefault(seen.path.rpartition(".")[0], []).append(seen)
        for calls in beside.values():
            if len(calls) == 4 and all(c.given is calls[0].given for c in calls[1:3]) and calls[3].given is not calls[0].given:
                found += [calls[0].path, calls[3].path]
        return tuple(found)
