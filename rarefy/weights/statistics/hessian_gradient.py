"""The Hessian of the loss times its own gradient: how the gradient's norm changes with every weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.collect import differentiable
from rarefy.core.errors import BadInput
from rarefy.core.records import Site
from rarefy.core.roles import ModelStatistic


@dataclass(frozen=True)
class HessianGradient(ModelStatistic):
    """The Hessian of the loss over the sites' weights, times the gradient over the same weights.

    ``h = H g,  g = 1/B sum_b dL_b/dw,  H = 1/B sum_b d2L_b/dw2``; half the gradient of ``g^T g``

    `collect` gives float32 of each site's shape, by one more backward pass for each batch instead of a Hessian. The
    outputs, or the logits of a language model's head, are divided by `temperature` first: it makes the softmax of an
    untrained classifier even.

    Raises:
        BadInput: the model returns no tensor and has no output embeddings, or a figure is not finite.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[1., 2.]]))
    >>> site = Site("weight", "", "weight", (1, 2))
    >>> half_square = lambda m, x: m(x).square().sum() / 2
    >>> HessianGradient(temperature=1.0).collect(model, [site], [torch.tensor([[1., 1.]])], half_square)["weight"].tolist()
    [[6.0, 6.0]]
    """

    temperature: float = 200.0
    name = "hessian_gradient"

    def collect(self, model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor]) -> dict[str, Tensor]:
        keys = sorted({s.key for s in sites})
        with differentiable(model, keys) as weights, _softened(model, self.temperature), torch.enable_grad():
            gradient = [torch.zeros_like(w) for w in weights]
            for batch in batches:
                gradient = [g + _or_zero(d, g) / len(batches) for g, d in zip(gradient, torch.autograd.grad(loss(model, batch), weights, allow_unused=True), strict=True)]
            product = [torch.zeros_like(w) for w in weights]
            for batch in batches:
                first = torch.autograd.grad(loss(model, batch), weights, create_graph=True, allow_unused=True)
                along = sum((d * g).sum() for d, g in zip(first, gradient, strict=True) if d is not None)
                second = torch.autograd.grad(along, weights, allow_unused=True) if isinstance(along, Tensor) and along.requires_grad else [None] * len(weights)
                product = [p + _or_zero(d, p) / len(batches) for p, d in zip(product, second, strict=True)]
        found = dict(zip(keys, product, strict=True))
        bad = [key for key, value in found.items() if not torch.isfinite(value).all()]
        if bad:
            raise BadInput(f"the Hessian-gradient product of {', '.join(bad)}", "it must be finite", "check the batches, or load the model in float32")
        return {s.name: s.read(found[s.key]).float() for s in sites}


def _or_zero(found: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if found is None else found.detach()


@contextmanager
def _softened(model: nn.Module, temperature: float) -> Iterator[None]:
    """Divide what the head returns by the temperature."""
    head = getattr(model, "get_output_embeddings", lambda: None)() or model

    def divide(module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise BadInput(f"a model that returns {type(output).__name__}", "a temperature divides logits, a tensor", "collect HessianGradient on the part that returns them")
        return output / temperature

    hook = head.register_forward_hook(divide)
    try:
        yield
    finally:
        hook.remove()
