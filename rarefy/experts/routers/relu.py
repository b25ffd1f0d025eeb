"""ReLU routing: a row gets every expert that its router scores above zero, and a penalty steers how many that are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Entry, Paper, Routing, Scores
from rarefy.core.roles import Choice, Controller
from rarefy.experts.balance.switch_balance import valid_rows
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routing import dense, positive


@dataclass(frozen=True)
class SteeredSparsity(Controller):
    """Steer the mean number of experts per row to K: ``lambda / T * sum_e f_e sum_t w_te``, ``f_e = E / (K T) * n_e``, averaged over layers.

    n_e is how many of the T rows that are not padding expert e serves (a count, no gradient): an L1 penalty that weighs on those with
    much load. After every step ``lambda *= factor`` where the share S of pairs of a row and an expert that are idle, over all layers and
    forwards of the step, was below ``1 - K / E``, else ``lambda /= factor``. The state is {"strength": lambda, "sparsity": S of the last step}.
    Source: Wang et al., ReMoE, arXiv 2412.14711, as noted from its code: lambda from 1e-8, factor 1.2.

    Raises:
        BadInput: K or the start not positive, a factor not above 1.
    """

    name = "steered-sparsity"
    target: float = 1.0
    start_at: float = 1e-8
    factor: float = 1.2

    def __post_init__(self) -> None:
        if not (self.target > 0 and self.start_at > 0 and self.factor > 1):
            raise BadInput(f"{self!r}", "the target and the start are positive and the factor is above 1", "pass for example target=1.0")

    def start(self, layers: Mapping[str, Any]) -> dict[str, Any]:
        return {"strength": self.start_at, "sparsity": 0.0}

    def loss(self, state: dict[str, Any], entries: Sequence[Entry]) -> Tensor | float:
        found = [self._penalty(entry) for entry in entries]
        return state["strength"] * torch.stack(found).mean() if found else 0.0

    def _penalty(self, entry: Entry) -> Tensor:
        rows, routing = valid_rows(entry).sum().clamp(min=1), entry.routing
        load = routing.experts / (self.target * rows) * routing.counts()
        return (load * dense(routing).sum(0)).sum() / rows

    def after_step(self, state: dict[str, Any], layers: Mapping[str, Any], entries: Sequence[Entry], optimizer: Optimizer) -> dict[str, Any]:
        pairs = sum(int(valid_rows(entry).sum()) * entry.routing.experts for entry in entries)
        if not pairs:
            return state
        busy = sum(int(entry.routing.counts().sum()) for entry in entries)
        wanted = sum(int(valid_rows(entry).sum()) * self.target for entry in entries)
        factor = self.factor if busy > wanted else 1 / self.factor
        return {"strength": state["strength"] * factor, "sparsity": 1 - busy / pairs}


def small(width: int, experts: int) -> Linear:
    """A linear router drawn with standard deviation 0.01."""
    router = Linear(width, experts)
    nn.init.normal_(router.weight, std=0.01)
    return router


@dataclass(frozen=True)
class ReLURouting(Choice):
    """Serve each row by every expert that it scores above zero, at that score: ``y = sum_e relu(x W)_e E_e(x)``.

    Scores with logits [R, E] -> Routing of R*E assignments, those at or below zero to nobody (which costs no expert); not normalised. It is
    continuous in the logits: an expert comes and goes at weight 0. A row may have none, and then comes out as zeros. In training
    `SteeredSparsity` brings the mean number of experts per row to `target`; call `Control.loss`. There is no capacity, and no other loss.
    Source: Wang et al., ReMoE, arXiv 2412.14711, as noted from its code.

    >>> r = ReLURouting()(Scores(torch.tensor([[0.5, -1.0, 2.0]])), Context())
    >>> r.expert.tolist(), r.weight.tolist()
    ([0, 3, 2], [0.5, 0.0, 2.0])
    """

    name = "relu"
    paper = Paper(
        "remoe",
        "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing",
        "arXiv 2412.14711",
        (
            "the sparsity is measured over the forwards of one process",
            "the strength is a double-precision number of the training flow, where the authors' code has a float32 buffer",
            "experts of the dense first steps are run as they are, without recomputing them to save memory",
            "the equations rest on notes made from the authors' code; of them the penalty was compared with a fork of that code, the strength's rule was not, and the paper was not read",
            "its language models were not trained",
        ),
    )
    affinity = staticmethod(small)
    target: float = 1.0

    @property
    def controllers(self) -> tuple[Controller, ...]:
        return (SteeredSparsity(self.target),)

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return positive(scores, context)

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        weight = dense(routing)
        return {"an expert's weight is its positive score, or it serves no row": bool(((weight == scores.logits.relu()) | (weight == 0)).all())}
