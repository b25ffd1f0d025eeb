"""Cosine routing: rows and experts meet in a space of few dimensions, by angle alone, at a learned temperature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Entry, Paper, Routing, Scores
from rarefy.core.roles import Affinity, Choice, Controller
from rarefy.experts.balance.at_temperature import AtTemperature
from rarefy.experts.routers.sigmoid import Sigmoid
from rarefy.experts.routers.switch import Switch


class Cosine(Affinity):
    """Score by angle: ``logits = cos(W x, v_e) / tau`` with W [D, d], v [E, D], D small (E/2 by default), tau learned.

    x [R, d] of any float type -> float32 Scores: logits [R, E], and `select` the cosines themselves, which rank alike and are what
    a balance loss of fixed temperature sees (`AtTemperature`), so that it does not push tau. A score that is not finite becomes the
    row's least finite one. `ByAngle` chooses with a softmax gate (tau from 0.3), `ByAngleSigmoid` with a sigmoid (tau from 0.07).
    The length of v_e does not change a score but does scale its gradient: see `KeepLengths`.
    Source: Chi et al., arXiv 2204.09179, eqs. 6-7 and section 3.1; torchscale's implementation has the initialisation (orthogonal,
    gain 0.32), but scales neither the row to length 1 nor by a temperature; we do as the paper does.

    Raises:
        BadInput: a temperature that is not positive.

    >>> router, x = Cosine(6, 4), torch.ones(2, 6)
    >>> bool(torch.allclose(router(x, Context(), None).logits, router(100 * x, Context(), None).logits, atol=1e-5))
    True
    """

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


@dataclass(frozen=True)
class KeepLengths(Controller):
    """Give every centre of a cosine router one length, before the first step and after each.

    A centre's length changes no score, but its gradient is scaled by 1 / length: this keeps the scale of its steps.
    Source: the implementation of arXiv 2204.09179, microsoft/torchscale, which does so in each forward.
    """

    name = "keep-lengths"
    length: float = 1.5

    def start(self, layers: Mapping[str, Any]) -> dict[str, Any]:
        for layer in layers.values():
            layer.affinity.rescale(self.length)
        return {}

    def after_step(self, state: dict[str, Any], layers: Mapping[str, Any], entries: Sequence[Entry], optimizer: Optimizer) -> dict[str, Any]:
        return self.start(layers)


PAPER = Paper(
    "x-moe",
    "On the Representation Collapse of Sparse Mixture of Experts",
    "arXiv 2204.09179",
    (
        "no capacity bounds an expert by default: the paper states none",
        "the equations were read in the paper (6-10, section 3.3)",
        "centres are put back to length 1.5 between steps, which is of the authors' code (torchscale, which does it before every forward) and not in the paper",
        "the collapse measure weighs experts by their rows, which the paper leaves open",
        "experts are single gated layers, where the paper's are three feed-forward sublayers; the multilingual pre-training was not run",
        "freezing for fine-tuning is a function of the API, and no command takes it",
    ),
)


@dataclass(frozen=True)
class ByAngle(Choice):
    """Send each row to the expert at the smallest angle, weighted by a softmax: ``w = exp(s_k / tau) / sum_j exp(s_j / tau)``.

    Scores of `Cosine` -> Routing with k = 1; the balance loss sees the cosines at a fixed temperature.
    Source: Chi et al., arXiv 2204.09179, eqs. 1, 7 (softmax gating) and 8.

    >>> ByAngle()(Scores(torch.tensor([[0.0, 50.0]])), Context()).expert.tolist()
    [1]
    """

    name = "by-angle"
    paper = PAPER
    affinity = Cosine
    balances = (AtTemperature(0.3),)
    controllers = (KeepLengths(),)

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return Switch()(scores, context)

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return Switch().invariants(routing, scores, context)


def sharp(width: int, experts: int) -> Cosine:
    """The cosine router at the temperature that the paper starts a sigmoid gate from, 0.07."""
    return Cosine(width, experts, temperature=0.07)


@dataclass(frozen=True)
class ByAngleSigmoid(Choice):
    """Send each row to the expert at the smallest angle, weighted by a sigmoid: ``w = sigmoid(s_k / tau)``.

    Scores of `Cosine` -> Routing with k = 1. Source: Chi et al., arXiv 2204.09179, eqs. 1, 7 (sigmoid gating) and 8.

    >>> ByAngleSigmoid()(Scores(torch.tensor([[-9.0, 0.0]])), Context()).weight.tolist()
    [0.5]
    """

    name = "by-angle-sigmoid"
    paper = PAPER
    affinity = staticmethod(sharp)
    balances = (AtTemperature(0.07),)
    controllers = (KeepLengths(),)

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return Sigmoid(1, dropout=0.0)(scores, context)

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return Switch().invariants(routing, scores, context)
