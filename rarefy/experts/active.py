"""How many experts serve a row: set anew on layers whose choice takes a number k."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from rarefy.core.errors import BadInput
from rarefy.core.roles import Choice


def set_active(model: nn.Module, k: int) -> nn.Module:
    """Let k experts serve each row in every routed layer whose choice has a field k; returns the model.

    Only the choice, which is a value, is replaced: parameters and state dict stay as they are, and setting k back gives the same bits.

    Raises:
        BadInput: no such layer, or k outside 1..E of one; nothing is changed then.

    >>> from rarefy.experts.banks.relu import ReLU
    >>> from rarefy.experts.moe import MoE
    >>> from rarefy.experts.routers.linear import Linear
    >>> from rarefy.experts.routers.topk import TopK
    >>> set_active(MoE(Linear(4, 3), TopK(1), ReLU(3, 4, 4)), 2).choice.k
    2
    """
    layers = [layer for layer in model.modules() if counts(layer)]
    if not layers:
        raise BadInput(f"{k} experts per row in {type(model).__name__}", "it needs a routed layer whose choice takes a number k")
    fewest = min(experts_of(layer) for layer in layers)
    if not 1 <= k <= fewest:
        raise BadInput(f"k = {k} with {fewest} experts", "a row takes between one and all of the experts", "choose k in 1..E")
    for layer in layers:
        with_k(layer, k)
    return model


def counts(layer: Any) -> bool:
    """Whether it is a routed layer whose choice takes a number k."""
    choice = getattr(layer, "choice", None)
    return isinstance(choice, Choice) and hasattr(choice, "k")


def with_k(layer: Any, k: int) -> None:
    """Replace the layer's choice by one that is the same but for k; the very same object stays where k is no other."""
    if layer.choice.k != k:
        layer.choice = dataclasses.replace(layer.choice, k=k)


def experts_of(layer: Any) -> int:
    """How many experts a routed layer has: its bank's, or its own."""
    bank = getattr(layer, "bank", layer)
    return int(bank.experts)
