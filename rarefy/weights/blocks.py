"""A model as a chain of blocks: found by watching one forward, so that a new architecture needs no adapter.

What every block is called with (masks, rotary embeddings, per-layer keyword arguments) is kept as it was in the
dense forward; only the hidden states are fed on from block to block.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.collect import call, valid_tokens

CACHES = ("past_key_values", "past_key_value", "layer_past")


@dataclass
class Calls:
    """One batch on its way through the chain: hidden states now, and each block's other arguments."""

    hidden: Tensor
    rest: list[tuple[tuple[Any, ...], dict[str, Any]]]
    valid: Tensor | None


def find_chain(model: nn.Module, batch: Any) -> list[tuple[str, nn.Module]]:
    """The longest ModuleList of one class whose blocks feed one another in a forward of `batch`; [] if there is none.

    >>> find_chain(nn.Linear(2, 2), torch.zeros(1, 2))
    []
    """
    candidates = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1 and len({type(b) for b in m}) == 1]
    for path, blocks in sorted(candidates, key=lambda c: -len(c[1])):
        if _is_chain(model, batch, list(blocks)):
            return [(f"{path}.{i}", block) for i, block in enumerate(blocks)]
    return []


def first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def _is_chain(model: nn.Module, batch: Any, blocks: list[nn.Module]) -> bool:
    seen: list[tuple[int, Any, Any]] = []
    hooks = [b.register_forward_hook(lambda _, a, k, out, i=i: seen.append((i, hidden_of(a, k), first(out))), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        with torch.no_grad(), uncached(model):
            call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    in_order = [i for i, _, _ in seen] == list(range(len(blocks)))
    return in_order and all(isinstance(b[1], Tensor) and b[1] is a[2] for a, b in pairwise(seen))


def capture(model: nn.Module, chain: Sequence[tuple[str, nn.Module]], batches: Sequence[Any]) -> list[Calls]:
    """One dense forward per batch: the first block's hidden states and every block's other arguments."""
    captured = []
    for batch in batches:
        hidden: list[Tensor] = []
        rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: list[Tensor] = hidden, rest: list[Any] = rest) -> None:
            if not hidden:
                hidden.append(hidden_of(args, kwargs).detach())
            rest.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states" and k not in CACHES}))

        hooks = [block.register_forward_pre_hook(hook, with_kwargs=True) for _, block in chain]
        try:
            with torch.no_grad(), uncached(model):
                call(model, batch)
        finally:
            for handle in hooks:
                handle.remove()
        captured.append(Calls(hidden[0], rest, valid_tokens(batch)))
    return captured


def called_before(model: nn.Module, chain: Sequence[tuple[str, nn.Module]], paths: Sequence[str], batch: Any) -> set[str]:
    """Which of the modules at `paths` a forward calls before it reaches the first block; all where there is no chain."""
    if not chain:
        return set(paths)
    order: list[str] = []
    hooks = [model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: order.append(path)) for path in (*paths, chain[0][0])]
    try:
        with torch.no_grad(), uncached(model):
            call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return set(order[: order.index(chain[0][0])])


def run_block(block: nn.Module, calls: Calls, index: int) -> Tensor:
    """The hidden states that block `index` makes of its input."""
    args, kwargs = calls.rest[index]
    with torch.no_grad():
        return first(block(calls.hidden, *args, **kwargs))


@contextmanager
def _flag(config: Any) -> Any:
    before = config.use_cache
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


def uncached(model: nn.Module) -> AbstractContextManager[Any]:
    """No key-value cache while calibrating: some models pass it positionally."""
    config = getattr(model, "config", None)
    return _flag(config) if getattr(config, "use_cache", None) else torch.no_grad()
