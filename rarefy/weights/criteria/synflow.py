"""SynFlow: prune before training and without data, in rounds, so that no layer is emptied before the others are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from rarefy.core.records import Paper, Phase, TrainRecipe
from rarefy.core.roles import Criterion
from rarefy.weights.allocations.global_scores import Global
from rarefy.weights.schedules.constant import Constant

ROUNDS = 100


@dataclass(frozen=True)
class Synflow(Criterion):
    """Rate a weight by the flow through it in the network of moduli.

    ``s = |w| dR/d|w|``; the scores of every layer add up to R, and at every hidden unit those in equal those out

    `scores` takes weight [O, ..., I] and synaptic_flow of the same shape; returns float32 scores of the weight's shape.

    Source: Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, arXiv
    2006.05467, eq. 2 and Algorithm 1.

    >>> import torch
    >>> Synflow().scores(torch.tensor([[-2.0, 1.0]]), synaptic_flow=torch.tensor([[0.5, 4.0]])).tolist()
    [[1.0, 4.0]]
    """

    name = "synflow"

    def scores(self, weight: Tensor, *, generator: Generator | None = None, synaptic_flow: Tensor) -> Tensor:
        return (weight.detach().float() * synaptic_flow.float()).abs()


def rounds(density: float, count: int = ROUNDS) -> tuple[Phase, ...]:
    """Phases of no steps: in round k the density is ``density^(k / count)``, and the flow is that of what round k-1 left."""
    return tuple(Phase("round", until=0, density=Constant(density ** (k / count)), criterion=Synflow()) for k in range(1, count + 1))


def _phases(density: float, steps: int) -> tuple[Phase, ...]:
    return (*rounds(density), Phase("train"))


SYNFLOW = TrainRecipe(
    "synflow",
    _phases,
    Global(),
    Synflow(),
    Paper(
        "synflow",
        "Pruning neural networks without any data by iteratively conserving synaptic flow",
        "arXiv 2006.05467",
        (
            "exact counts: ties go to the earlier layer",
            "the flow is computed in float64; the authors' code has that line commented out",
            "biases are left out of the flow; at the authors' initialisation they are zero",
        ),
    ),
)
