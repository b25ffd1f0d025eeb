"""Actions on entering a phase: what is done once, to the weights or the optimizer, before its masks are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rarefy.core.errors import BadInput


@dataclass(frozen=True)
class Remember:
    """An action on entering a phase: keep a copy of every parameter and buffer under a name; it checkpoints."""

    name: str = "early"

    def __call__(self, sparsifier: Any) -> None:
        model = sparsifier.model
        sparsifier.anchors[self.name] = {key: t.detach().clone() for key, t in (*model.named_parameters(), *model.named_buffers())}


@dataclass(frozen=True)
class Afresh:
    """An action on entering a phase: the optimizer forgets its moments, as a new one would have none."""

    def __call__(self, sparsifier: Any) -> None:
        if sparsifier.optimizer is not None:
            sparsifier.optimizer.state.clear()


@dataclass(frozen=True)
class Rewind:
    """An action on entering a phase: every parameter and buffer is as it was remembered, outside the mask zero, the optimizer afresh.

    Raises:
        BadInput: nothing was remembered under the name.
    """

    name: str = "early"

    @torch.no_grad()
    def __call__(self, sparsifier: Any) -> None:
        if self.name not in sparsifier.anchors:
            raise BadInput(f"rewinding to {self.name!r}", f"remembered are {', '.join(sparsifier.anchors) or 'none'}", "enter an earlier phase with Remember")
        kept = sparsifier.anchors[self.name]
        for key, tensor in (*sparsifier.model.named_parameters(), *sparsifier.model.named_buffers()):
            if key in kept:
                tensor.copy_(kept[key])
        Afresh()(sparsifier)


@dataclass(frozen=True)
class ScaleToFanIn:
    """An action on entering a phase: scale every row of a site as if it had been initialised with the inputs that it kept.

    ``w_r <- w_r sqrt(columns / kept_r)``, which makes a variance of g^2 / columns one of g^2 / kept_r; an empty row stays
    """

    @torch.no_grad()
    def __call__(self, sparsifier: Any) -> None:
        for key, weight in sparsifier.weights.items():
            mask = sparsifier.support.read(key, sparsifier.support.masks[key]).flatten(1)
            scale = (mask.shape[1] / mask.sum(1).clamp(min=1)).sqrt()
            view = sparsifier.support.read(key, weight)
            view.mul_(scale.view(-1, *[1] * (view.dim() - 1)))


@dataclass(frozen=True)
class Confine:
    """An action on entering a phase: what the masks keep now bounds every later choice; the weights outside are zero for good."""

    @torch.no_grad()
    def __call__(self, sparsifier: Any) -> None:
        sparsifier.support.confine()
        for key, weight in sparsifier.weights.items():
            weight.masked_fill_(~sparsifier.support.masks[key], 0.0)
