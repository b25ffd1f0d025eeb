"""Replicas: copies of one model that share a mask, and their mean, which has that mask too.

A mean is an anchor of the sparsifier like any remembered moment: `Rewind` makes the model become it, and it checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.collect import call
from rarefy.core.errors import BadInput, Refused
from rarefy.core.modes import evaluating

COUNT = "rarefy_count"  # how many copies are in a mean


def average(copies: Sequence[Mapping[str, Tensor]], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The uniform mean of copies of one model, tensor by tensor; what is no float is the last copy's.

    ``w = 1/m sum_i w_i``, whose support lies in the mask because that of every w_i does

    `copies` are {name: tensor} of one model each, `masks` {name: bool mask, the tensor's shape} of the sparse ones.

    Raises:
        BadInput: no copies, or copies of different tensors.
        Refused: a copy that is not zero outside the mask: the mean of models pruned apart is denser than they are.

    Source: Zimmer, Spiegel and Pokutta, Sparse Model Soups, arXiv 2306.16788.

    >>> mask = {"w": torch.tensor([True, False])}
    >>> average([{"w": torch.tensor([1., 0.])}, {"w": torch.tensor([3., 0.])}], mask)["w"].tolist()
    [2.0, 0.0]
    """
    if not copies:
        raise BadInput("no copies", "a mean is of one copy or more")
    mean: dict[str, Tensor] = {}
    for number, copy in enumerate(copies):
        if number and {k: v.shape for k, v in copy.items()} != {k: v.shape for k, v in mean.items()}:
            raise BadInput(f"copy {number}", "copies of one model have the same tensors, shape for shape", "average models of one architecture")
        mean = joined(mean, copy, masks, number)
    return mean


def joined(mean: Mapping[str, Tensor], copy: Mapping[str, Tensor], masks: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The mean of `number` copies with one more: ``w + (w_new - w) / (number + 1)``; Refused as by `average`."""
    for name, mask in masks.items():
        stray = int(((copy[name] != 0) & ~mask).sum()) + (int(((mean[name] != 0) & ~mask).sum()) if number else 0)
        if stray:
            raise Refused(
                f"a copy with {stray:,} weights of {name} outside the mask",
                "copies that are averaged share one mask, or the mean is denser than each",
                "prune once, then train copies",
            )
    if not number:
        return {name: t.detach().clone() for name, t in copy.items()}
    return {name: mean[name] + (t.detach() - mean[name]) / (number + 1) if t.is_floating_point() else t.detach().clone() for name, t in copy.items()}


@dataclass(frozen=True)
class Collect:
    """An action on entering a phase: the model as it is now joins the mean under a name.

    Raises:
        Refused: it has not the mask that those before it had.
    """

    name: str = "soup"

    @torch.no_grad()
    def __call__(self, sparsifier: Any) -> None:
        model = sparsifier.model
        copy = dict((*model.named_parameters(), *model.named_buffers()))
        mean = dict(sparsifier.anchors.get(self.name, {}))
        number = int(mean.pop(COUNT, torch.tensor(0)))
        sparsifier.anchors[self.name] = {**joined(mean, copy, sparsifier.support.masks, number), COUNT: torch.tensor(number + 1)}


@dataclass(frozen=True)
class Forget:
    """An action on entering a phase: what was remembered or collected under a name is no more."""

    name: str = "soup"

    def __call__(self, sparsifier: Any) -> None:
        sparsifier.anchors.pop(self.name, None)


@dataclass(frozen=True)
class RecalibrateNorms:
    """An action on entering a phase: batch norms measure their running mean and variance anew, of the weights as they are now.

    Raises:
        BadInput: the model has running statistics, and the sparsifier no batches to measure them on.
    """

    def __call__(self, sparsifier: Any) -> None:
        recalibrate(sparsifier.model, sparsifier.batches)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Sequence[Any]) -> None:
    """The running statistics of every batch norm become the plain mean of those of the batches; all else stays as it is.

    Raises:
        BadInput: there are running statistics and no batches.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    if not batches:
        raise BadInput("no batches", f"{len(norms)} batch norms are measured anew after averaging", "pass batches=")
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # a plain mean over the batches
        for batch in batches:
            call(model, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
