"""SNIP: prune before training, by how much the loss feels each connection."""

from __future__ import annotations

from rarefy.core.records import Paper, Phase, TrainRecipe
from rarefy.weights.allocations.global_scores import Global
from rarefy.weights.criteria.gradient_weight import GradientWeight
from rarefy.weights.schedules.constant import Constant


def _phases(density: float, steps: int) -> tuple[Phase, ...]:
    return (Phase("snip", density=Constant(density), criterion=GradientWeight()),)


# |dL(c * w)/dc| at c = 1 is |w * dL/dw|, the criterion of the gradient; the paper divides by the sum over all weights, which ranks alike.
SNIP = TrainRecipe(
    "snip",
    _phases,
    Global(),
    GradientWeight(),
    Paper(
        "snip",
        "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
        "arXiv 1810.02340",
        (
            "the sensitivity is measured on the first batches of the run, eight by default, instead of one mini-batch",
            "the task's own initialisation, uniform with variance 1/(3 inputs), in place of Glorot's; both scale the variance, as the paper asks",
            "exact counts: ties go to the earlier layer",
        ),
    ),
)
