"""Calibration rows: a sample of what modules are given, or return, in forwards of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.activations.watch import without_grad
from rarefy.core.attach import OUTPUT, split_place
from rarefy.core.collect import call, valid_tokens
from rarefy.core.errors import BadInput

ROWS = 2048  # calibration rows kept per place


def unpadded(x: Tensor, valid: Tensor | None) -> Tensor:
    """Rows [R, C] of the tokens that are not padding."""
    return x[valid] if valid is not None and x.shape[:2] == valid.shape else x.reshape(-1, x.shape[-1])


def collect_rows(model: nn.Module, places: Sequence[str], batches: Iterable[Any]) -> dict[str, Tensor]:
    """{place: rows [R, C]}: every s-th unpadded token, at most ROWS in all; the same tokens at every place. {} without batches.

    Raises:
        BadInput: no token reached a place.
    """
    given = list(batches)
    if not given:
        return {}
    stride = -(-sum(_tokens(batch) for batch in given) // ROWS)
    seen: dict[str, list[Tensor]] = {place: [] for place in places}
    valid: list[Tensor | None] = [None]

    def keep(place: str, x: Tensor) -> None:
        seen[place].append(unpadded(x.detach(), valid[0])[::stride].clone())

    hooks = []
    for place in seen:
        module = model.get_submodule(split_place(place)[0])
        if place.endswith(OUTPUT):
            hooks.append(module.register_forward_hook(lambda _, __, made, place=place: keep(place, made)))
        else:
            hooks.append(module.register_forward_pre_hook(lambda _, args, place=place: keep(place, args[0])))
    try:
        with without_grad(model):
            for batch in given:
                valid[0] = valid_tokens(batch)
                call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for place, found in seen.items():
        if not sum(x.shape[0] for x in found):
            raise BadInput(
                f"the {'output' if place.endswith(OUTPUT) else 'input'} of {place.removesuffix(OUTPUT)}",
                "no calibration token reached it",
                "calibrate with batches that reach every gated module",
            )
    return {place: torch.cat(found) for place, found in seen.items()}


def _tokens(batch: Any) -> int:
    first = next(iter(batch.values())) if isinstance(batch, dict) else batch[0] if isinstance(batch, (tuple, list)) else batch
    return int(first.numel())
