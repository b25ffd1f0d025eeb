"""GraSP: prune before training so that the gradient keeps its norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from rarefy.core.records import Paper, Phase, TrainRecipe
from rarefy.core.roles import Criterion
from rarefy.weights.allocations.global_scores import Global
from rarefy.weights.schedules.constant import Constant


@dataclass(frozen=True)
class GradientSignal(Criterion):
    """Rate a weight by how much of the gradient's norm goes with it, to first order.

    ``s = w * (H g)``; setting w to zero changes ``g^T g`` by about ``-2 s``

    `scores` takes weight [O, ..., I] and hessian_gradient of the same shape; returns float32 scores of the weight's
    shape, of either sign: a weight of negative score holds the gradient back and goes first.

    Source: Wang, Zhang and Grosse, Picking Winning Tickets Before Training by Preserving Gradient Flow, arXiv
    2002.07376, section 4, where S(-theta) = -theta * Hg and the weights of highest S are removed.

    >>> import torch
    >>> GradientSignal().scores(torch.tensor([[-2.0, 1.0]]), hessian_gradient=torch.tensor([[0.5, 4.0]])).tolist()
    [[-1.0, 4.0]]
    """

    name = "grasp"
    exceptions: ClassVar[Mapping[str, str]] = {
        "zero_weights_are_rated_least": "a weight that holds the gradient back is rated below one that does nothing",
        "the_sign_of_a_weight_does_not_matter": "the product with the Hessian-gradient is signed",
    }

    def scores(self, weight: Tensor, *, generator: Generator | None = None, hessian_gradient: Tensor) -> Tensor:
        return weight.detach().float() * hessian_gradient.float()


def _phases(density: float, steps: int) -> tuple[Phase, ...]:
    return (Phase("grasp", density=Constant(density), criterion=GradientSignal()),)


GRASP = TrainRecipe(
    "grasp",
    _phases,
    Global(),
    GradientSignal(),
    Paper(
        "grasp",
        "Picking Winning Tickets Before Training by Preserving Gradient Flow",
        "arXiv 2002.07376",
        (
            "measured on the first batches of the run, eight by default, instead of a fixed number of samples of each class",
            "logits divided by 200, as in the authors' code",
            "linear layers keep their initialisation; the authors' code draws them anew from Glorot's normal before rating",
            "exact counts: ties go to the earlier layer",
        ),
    ),
)
