"""How much a mixture relies on single experts: the likeliest are taken away, or the shared ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Routing, Scores
from rarefy.experts.moe import MoE


@dataclass(frozen=True)
class WithoutLikeliest:
    """A choice from what is left of each row's experts without its `share` likeliest (rounded down); weights are as without it.

    `inner` must rank by `Scores.select`. Source: Dai et al., DeepSeekMoE, arXiv 2401.06066, section 4.5, which leaves the weights open.

    Raises:
        BadInput: fewer experts are left than the choice takes.
    """

    inner: Any
    share: float

    def __call__(self, scores: Scores, context: Context) -> Routing:
        seen = scores.logits if scores.select is None else scores.select
        if context.live is not None:
            seen = seen.masked_fill(~context.live, -torch.inf)
        taken = int(self.share * seen.shape[1])
        if seen.shape[1] - taken < getattr(self.inner, "k", 1):
            raise BadInput(f"{taken} of {seen.shape[1]} experts taken away from {self.inner!r}", "as many are left as a row takes", "take a smaller share")
        likeliest = seen.argsort(dim=1, descending=True, stable=True)[:, :taken]
        routing: Routing = self.inner(replace(scores, select=seen.scatter(1, likeliest, torch.finfo(seen.dtype).min)), context)
        return routing


@contextmanager
def without_likeliest(model: nn.Module, share: float) -> Iterator[None]:
    """Inside the block every routed layer lacks each row's likeliest experts; the rise of the loss says how little others can stand in.

    Raises:
        BadInput: a share outside [0, 1), or a model without routed layers.
    """
    if not 0 <= share < 1:
        raise BadInput(f"a share of {share}", "some experts are left: a share lies in [0, 1)")
    with _changed(model, lambda layer: {"choice": WithoutLikeliest(layer.choice, share)}):
        yield


@contextmanager
def without_shared(model: nn.Module) -> Iterator[None]:
    """Inside the block no layer has shared experts, and each row gets as many more routed ones: the same compute.

    Source: Dai et al., DeepSeekMoE, arXiv 2401.06066, section 4.5 (one shared expert for one more routed).

    Raises:
        BadInput: a model without routed layers, or whose choice has no field k to raise.
    """

    def changes(layer: MoE) -> dict[str, Any]:
        if layer.shared is None:
            return {}
        choice: Any = layer.choice
        if "k" not in {f.name for f in fields(choice)}:
            raise BadInput(f"{choice!r} without shared experts", "a row must be able to take more routed ones")
        return {"shared": None, "choice": replace(choice, k=choice.k + layer.shared.bank.experts)}  # type: ignore[union-attr]

    with _changed(model, changes):
        yield


@contextmanager
def _changed(model: nn.Module, changes: Any) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise BadInput(f"experts of {type(model).__name__}", "the model needs a routed layer")
    before = [(layer, {name: getattr(layer, name) for name in changes(layer)}) for layer in layers]
    try:
        for layer in layers:
            for name, value in changes(layer).items():
                setattr(layer, name, value)
        yield
    finally:
        for layer, values in before:
            for name, value in values.items():
                setattr(layer, name, value)
