"""Cosine routing: rows and experts meet in a space of few dimensions, by angle alone, at a learned temperature."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Scores
from rarefy.core.roles import Affinity


class Cosine(Affinity):
    """Score by angle: ``logits = cos(W x, v_e) / tau`` with W [D, d], v [E, D], D small (E/2 by default), tau learned.

    x [R, d] of any float type -> float32 Scores: logits [R, E], and `select` the cosines themselves, which rank alike and are what
    a balance loss of fixed temperature sees (`AtTemperature`), so that it does not push tau. A score that is not finite becomes the
    row's least finite one. Choose with `Switch()` (softmax gate, tau from 0.3) or `Sigmoid(1)` (tau from 0.07).
    The length of v_e does not change a score but does scale its gradient: `keep_lengths` puts it back to 1.5 after every step.
    Source: Chi et al., arXiv 2204.09179, section 3; torchscale's implementation has the initialisation (orthogonal, gain 0.32) and
    the length 1.5, but scales neither the row to length 1 nor by a temperature; we do as the paper does.

    Raises:
        BadInput: a temperature that is not positive.

    >>> router, x = Cosine(6, 4), torch.ones(2, 6)
    >>> bool(torch.allclose(router(x, Context(), None).logits, router(100 * x, Context(), None).logits, atol=1e-5))
    True
    """

    paper = Paper(
        "x-moe",
        "On the Representation Collapse of Sparse Mixture of Experts",
        "arXiv 2204.09179",
        ("the formula of the collapse measure is from memory of the paper", "the multilingual pre-training was not run"),
    )

    def __init__(self, width: int, experts: int, *, space: int | None = None, temperature: float = 0.3) -> None:
        super().__init__()
        if not temperature > 0:
            raise BadInput(f"temperature {temperature}", "a temperature is positive", "pass for example 0.3")
        space = max(1, experts // 2) if space is None else space
        self.reduce = nn.Parameter(torch.randn(space, width) / width**0.5)
        self.centres = nn.Parameter(nn.init.orthogonal_(torch.empty(experts, space), gain=0.32))
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        with torch.autocast(x.device.type, enabled=False):
            low = F.linear(x.float(), self.reduce.float())
            cosine = _finite(F.normalize(low, dim=1, eps=1e-4) @ F.normalize(self.centres.float(), dim=1, eps=1e-4).T)
            return Scores(cosine / self.temperature.float().clamp(min=1e-4), select=cosine)

    @torch.no_grad()
    def rescale(self, length: float = 1.5) -> None:
        """Give every expert's centre this length, in place."""
        self.centres.mul_(length / self.centres.norm(dim=1, keepdim=True).clamp(min=1e-4))


def _finite(scores: Tensor) -> Tensor:
    ok = scores.isfinite()
    least = torch.where(ok, scores, torch.inf).amin(1, keepdim=True)
    return torch.where(ok, scores, torch.where(least.isfinite(), least, 0.0).detach())


def keep_lengths(model: nn.Module, optimizer: torch.optim.Optimizer, length: float = 1.5) -> RemovableHandle:
    """After every step of the optimizer, rescale the centres of every cosine router in the model; now as well.

    Raises:
        BadInput: the model has no cosine router.
    """
    routers = [m for m in model.modules() if isinstance(m, Cosine)]
    if not routers:
        raise BadInput(f"keep_lengths of {type(model).__name__}", "the model needs a cosine router")

    def rescale(*_: Any) -> None:
        for router in routers:
            router.rescale(length)

    rescale()
    return optimizer.register_step_post_hook(rescale)
