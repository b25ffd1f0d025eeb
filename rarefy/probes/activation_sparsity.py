"""How sparse MLP units are by themselves, and the gradient at initialisation that makes them so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.activations.rows import unpadded
from rarefy.activations.watch import mlps, without_grad
from rarefy.core.collect import call, valid_tokens
from rarefy.core.errors import BadInput


@dataclass(frozen=True)
class Firing:
    """One MLP: tokens seen, and for each unit [C] on how many of them it was not zero."""

    tokens: int
    counts: Tensor

    @property
    def density(self) -> float:
        """The fraction of units that is not zero, on average over tokens."""
        return float(self.counts.double().mean()) / self.tokens

    @property
    def dead(self) -> float:
        """The fraction of units that no token made other than zero."""
        return float((self.counts == 0).double().mean())


def firing(model: nn.Module, batches: Sequence[Any]) -> dict[str, Firing]:
    """{path of each MLP's activation function: `Firing`}, over the unpadded tokens of `batches`, exact zeros only.

    ``density = mean over tokens of nnz(act(W x)) / C``

    Raises:
        BadInput: no batches, or a model that shows no MLP.

    Source: Li et al., The Lazy Neuron Phenomenon, ICLR 2023, arXiv 2210.06313, section 2.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.eye(2)), model[0].bias.zero_()
    >>> found = firing(model, [torch.tensor([[1.0, -1.0], [2.0, -3.0]])])["1"]
    >>> found.density, found.dead
    (0.5, 0.5)
    """
    found: dict[str, Firing] = {}
    valid: list[Tensor | None] = [None]

    def see(path: str, made: Tensor) -> None:
        rows = unpadded(made.detach(), valid[0])
        before = found.get(path, Firing(0, torch.zeros(rows.shape[-1], dtype=torch.int64, device=rows.device)))
        found[path] = Firing(before.tokens + rows.shape[0], before.counts + (rows != 0).sum(0))

    with without_grad(model), _acts(model, batches, see):
        for batch in batches:
            valid[0] = valid_tokens(batch)
            call(model, batch)
    return found


def unit_gradients(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> dict[str, tuple[float, float]]:
    """{path of each MLP's activation function: (mean of dL/dh over tokens and units, its t statistic)}.

    ``t = mean / (std / sqrt(N))`` of the N entries of dL/dh, h = act(W x). A positive mean means that descent lowers the units.

    Raises:
        BadInput: a model that shows no MLP.

    Source: Li et al., The Lazy Neuron Phenomenon, ICLR 2023, arXiv 2210.06313, section 4.
    """
    held: dict[str, Tensor] = {}

    def see(path: str, made: Tensor) -> None:
        held[path] = made

    with _acts(model, [batch], see):
        value = loss(model, batch)
    grads = torch.autograd.grad(value, list(held.values()))
    return {path: (float(g.mean()), float(g.mean() / (g.std() / g.numel() ** 0.5))) for path, g in zip(held, grads, strict=True)}


@contextmanager
def _acts(model: nn.Module, batches: Sequence[Any], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    found = mlps(model, batches[0]) if batches else []
    if not found:
        raise BadInput("the model and its batches", "no MLP was seen in a forward", "pass a batch, and a model with activation functions between matrices")
    hooks = [model.get_submodule(m.act).register_forward_hook(lambda _, __, made, path=m.act: see(path, made)) for m in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
