"""Laid: the forward sees the weight in a layout, with what its pattern keeps; the optimizer sees the raw tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rarefy.core.records import Progress, Pruned
from rarefy.core.roles import Selection, View
from rarefy.layouts.formats import Format
from rarefy.layouts.registry import DENSE, STEN
from rarefy.layouts.selections import Same
from rarefy.layouts.tensor import convert

Map = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Laid(View):
    """``w_eff = w * mask``, handed to the layer's operator in a layout; the gradient reaches the whole raw weight.

    `refresh`, which follows a step of the optimizer, asks `after_step` for the mask and writes zeros outside it:
    `Same()` keeps the pattern, another selection chooses it anew among the values that the step left. `gradient` is the
    format of the weight's gradient; None leaves it dense, so that what is zero may come back.
    `mask` is bool, the shape of the weight, and saved with the model. `axes` bring the weight to [O, ..., I], as selections
    see it. A Linear, Conv or Embedding is handed the layout; any other module sees the same values densely.

    >>> view = Laid(torch.tensor([[True, False]]), "csr")
    >>> view(torch.tensor([[2.0, 3.0]])).tolist(), view.stored(torch.tensor([[2.0, 3.0]]))
    ([[2.0, 0.0]], LayoutTensor(csr, shape=(1, 2), dtype=torch.float32))
    """

    paper = STEN
    mask: Tensor

    @classmethod
    def examples(cls) -> tuple[Laid, ...]:
        mask = torch.arange(48).view(6, 8) % 3 != 0
        return cls(mask.clone()), cls(mask.clone(), "bitmask"), cls(mask.clone(), "csr", gradient=Format(external=Same()))

    def __init__(self, mask: Tensor, layout: str = DENSE, after_step: Selection | None = None, gradient: Format | None = None, axes: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.layout, self.after_step, self.gradient, self.axes = layout, after_step or Same(), gradient, axes or tuple(range(mask.dim()))
        self._ready: tuple[object, Any] | None = None  # what the raw weight and the mask were, and the weight in its layout

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None}

    def forward(self, weight: Tensor) -> Tensor:
        found: Tensor = convert(weight, Same(), DENSE, self.gradient, self.mask)
        return found

    def stored(self, weight: Tensor) -> Any:
        """The weight in its layout; made again where the raw weight changed, or wants a gradient."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and weight.requires_grad):
            return convert(weight, Same(), self.layout, self.gradient, self.mask)
        now = (weight.data_ptr(), weight._version, weight.dtype, self.mask.data_ptr(), self.mask._version)
        if self._ready is None or self._ready[0] != now:
            self._ready = now, convert(weight.detach(), Same(), self.layout, kept=self.mask)
        return self._ready[1]

    def op(self, apply: Map, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return apply(x, self.stored(weight), bias)

    def export(self, weight: Tensor) -> Pruned:
        return Pruned(torch.where(self.mask, weight.detach(), 0.0), self.mask.clone())

    def choose(self, weight: Tensor, selection: Selection) -> None:
        """Keep what a selection keeps of the weight, seen as [O, ..., I]."""
        self.mask.permute(self.axes).copy_(selection.mask(weight.permute(self.axes), self.mask.permute(self.axes)))

    @torch.no_grad()
    def refresh(self, weight: Tensor, progress: Progress) -> None:
        self.choose(weight, self.after_step)
        weight.masked_fill_(~self.mask, 0.0)
