"""Masks as named sets: which entries of which tensors exist, and what a change does to weights and optimizer state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.core.errors import BadInput
from rarefy.core.records import Delta, StatePolicy, Units


class Support:
    """One bool mask per key, the shape of its tensor. Everything is kept until told otherwise; `confine` draws a line around it.

    `axes` of a key brings its tensor to [O, ..., I], as a Site's do; without an entry the tensor is taken as it is.
    """

    def __init__(self, weights: Mapping[str, Tensor], axes: Mapping[str, Sequence[int]] | None = None) -> None:
        self.axes = {key: tuple((axes or {}).get(key, range(w.dim()))) for key, w in weights.items()}
        self.masks = {key: torch.ones(w.shape, dtype=torch.bool, device=w.device) for key, w in weights.items()}
        self.outer: dict[str, Tensor] = {}  # what bounds every later choice; empty: nothing does

    def counts(self) -> dict[str, int]:
        return {key: int(mask.sum()) for key, mask in self.masks.items()}

    def units(self) -> tuple[Units, ...]:
        return tuple(Units(key, self.shape(key), (), cap=int(self.outer[key].sum()) if self.outer else None) for key in self.masks)

    def confine(self) -> None:
        """Every later mask is a part of the masks as they are now."""
        self.outer = {key: mask.clone() for key, mask in self.masks.items()}

    def bound(self, key: str) -> Tensor | None:
        """Where [O, ..., I] a choice may keep anything; None: everywhere."""
        return self.read(key, self.outer[key]) if self.outer else None

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a key's view [O, ..., I]."""
        return tuple(self.read(key, self.masks[key]).shape)

    def read(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor of the key's shape as a view [O, ..., I]."""
        return tensor.permute(self.axes[key])

    def back(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor [O, ..., I] in the order of the key's own axes: the inverse of `read`."""
        axes = self.axes[key]
        return tensor.permute(tuple(axes.index(a) for a in range(len(axes))))

    def state_dict(self) -> dict[str, Tensor]:
        return {key: mask.clone() for key, mask in self.masks.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy masks in place, because views may hold them. BadInput where keys or shapes differ."""
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in self.masks.items()}:
            raise BadInput(f"masks of {sorted(state)}", f"this sparsifier has masks of {sorted(self.masks)}, shape for shape", "build it with the sites it was saved with")
        for key, mask in self.masks.items():
            mask.copy_(state[key])


def between(old: Tensor, new: Tensor) -> Delta:
    """The change from one mask to another.

    >>> d = between(torch.tensor([True, False]), torch.tensor([False, True])); d.drop.tolist(), d.grow.tolist()
    ([0], [1])
    """
    return Delta((old & ~new).flatten().nonzero()[:, 0], (new & ~old).flatten().nonzero()[:, 0])


@torch.no_grad()
def apply(delta: Delta, mask: Tensor, weight: nn.Parameter, policy: StatePolicy, optimizer: Optimizer | None) -> None:
    """Carry a change out on the mask (in place), the weight and the optimizer's moments; an entry both dropped and grown starts anew."""
    flat = mask.view(-1)
    flat[delta.drop] = False
    flat[delta.grow] = True
    values = weight.detach().flatten().clone()
    if policy.drop_weight == "zero":
        values[delta.drop] = 0
    if policy.grow_weight == "zero":
        values[delta.grow] = 0
    elif policy.grow_weight == "fill" and delta.fill is not None:
        values[delta.grow] = delta.fill.to(values)
    weight.copy_(values.view_as(weight))
    for moment in moments(optimizer, weight):
        state = moment.flatten().clone()
        if policy.drop_state == "zero":
            state[delta.drop] = 0
        if policy.grow_state == "zero":
            state[delta.grow] = 0
        moment.copy_(state.view_as(moment))


def moments(optimizer: Optimizer | None, weight: Tensor) -> list[Tensor]:
    """The optimizer's tensors that have one entry per weight."""
    state = {} if optimizer is None else optimizer.state.get(weight, {})
    return [s for s in state.values() if isinstance(s, Tensor) and s.shape == weight.shape]
