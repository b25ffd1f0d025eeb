"""What a forward shows about a model's matrices: which read the same tensor, which make and read the hidden units of an MLP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.attach import plain_type
from rarefy.core.collect import call
from rarefy.weights.blocks import uncached


@dataclass(frozen=True)
class Seen:
    """One call of a module: what it was given and what it returned."""

    path: str
    given: Tensor
    made: Tensor


@dataclass(frozen=True)
class Mlp:
    """``reads(act(makes(x)) * partner(x))``, paths of the modules; `partner` is None where the units are not multiplied."""

    makes: str
    act: str
    partner: str | None
    reads: str


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a Linear, a packed one or transformers' Conv1D."""
    return issubclass(plain_type(module), nn.Linear) or plain_type(module).__name__ in ("Conv1D", "PackedLinear", "PackedConv1D")


def matrix_shape(module: Any) -> tuple[int, int]:
    """(outputs, inputs)."""
    if hasattr(module, "in_features"):
        return int(module.out_features), int(module.in_features)
    return int(module.weight.shape[1]), int(module.weight.shape[0])


def _plain(module: nn.Module) -> bool:
    """Whether a module may be an activation function: nothing inside but, perhaps, gates."""
    return not list(module.parameters(recurse=False)) and all(name.startswith("rarefy_") for name, _ in module.named_children())


@contextmanager
def without_grad(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no cache; the mode is as before afterwards."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad(), uncached(model):
            yield
    finally:
        model.train(was)


def watch(model: nn.Module, batch: Any) -> list[Seen]:
    """The calls of every matrix and of every module without parameters and children, in order, in one forward of `batch`."""
    seen: list[Seen] = []
    hooks = []
    for path, module in model.named_modules():
        if path and (is_matrix(module) or _plain(module)):

            def hook(_: nn.Module, args: tuple[Any, ...], made: Any, path: str = path) -> None:
                if args and isinstance(args[0], Tensor) and isinstance(made, Tensor):
                    seen.append(Seen(path, args[0], made))

            hooks.append(module.register_forward_hook(hook))
    try:
        with without_grad(model):
            call(model, batch)
    finally:
        for handle in hooks:
            handle.remove()
    return seen


def mlps(model: nn.Module, batch: Any) -> list[Mlp]:
    """Every MLP that one forward shows: a matrix, an activation function of what it made, and a matrix beside them that reads as many units.

    >>> mlps(nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2)), torch.zeros(1, 2))
    [Mlp(makes='0', act='1', partner=None, reads='2')]
    """
    calls = watch(model, batch)
    matrices = [c for c in calls if is_matrix(model.get_submodule(c.path))]
    found = []
    for act in (c for c in calls if not is_matrix(model.get_submodule(c.path)) and c.made.shape == c.given.shape):
        beside = [c for c in matrices if c.path.rpartition(".")[0] == act.path.rpartition(".")[0]]
        makes = next((c for c in beside if c.made is act.given), None)
        if makes is None:
            continue
        partner = next((c for c in beside if c is not makes and c.given is makes.given and c.made.shape == makes.made.shape), None)
        reads = [c for c in beside if c not in (makes, partner) and c.given.shape == act.made.shape]
        if len(reads) == 1:
            found.append(Mlp(makes.path, act.path, None if partner is None else partner.path, reads[0].path))
    return found
