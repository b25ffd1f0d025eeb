"""A bank's experts one by one, made when asked for: a layer of hundreds costs what the few that run cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor

Expert = Callable[[Tensor], Tensor]


class Split(Sequence[Expert]):
    """Functions [n, H] -> [n, H], the e-th being `make(e)`.

    >>> [f(torch.ones(1)).item() for f in Split(3, lambda e: lambda x: e * x)]
    [0.0, 1.0, 2.0]
    """

    def __init__(self, experts: int, make: Callable[[int], Expert]) -> None:
        self._experts, self._make = experts, make

    def __len__(self) -> int:
        return self._experts

    @overload
    def __getitem__(self, expert: int) -> Expert: ...

    @overload
    def __getitem__(self, expert: slice) -> Sequence[Expert]: ...

    def __getitem__(self, expert: int | slice) -> Expert | Sequence[Expert]:
        chosen = range(self._experts)[expert]
        return [self._make(e) for e in chosen] if isinstance(chosen, range) else self._make(chosen)


def slices(weight: Tensor) -> Sequence[Tensor]:
    """The slices [E] of a fused tensor, to be indexed.

    Where gradients flow, all at once: the backward then stacks them once, where that of one indexing would fill a tensor of all E.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        return weight.unbind(0)
    return weight  # type: ignore[return-value]
