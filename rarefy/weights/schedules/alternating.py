"""Alternating: dense and sparse phases in turn (AC/DC)."""

from __future__ import annotations

from itertools import pairwise

from rarefy.core.errors import BadInput
from rarefy.core.records import Paper, Phase, TrainRecipe
from rarefy.weights.actions import Afresh
from rarefy.weights.allocations.global_scores import Global
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.schedules.constant import Constant
from rarefy.weights.schedules.cosine import Cosine
from rarefy.weights.schedules.shifted import Shifted

PERCENT = (0, *range(10, 75, 5), 75, 85, 100)  # of training: where a phase begins, dense at 0 and from then on in turn


def turns(steps: int) -> tuple[int, ...]:
    """The steps at which phases begin, and the last step: everything stretches with the whole.

    >>> turns(200)
    (0, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140, 150, 170, 200)
    """
    if steps < 20:
        raise BadInput(f"{steps} steps", "the shortest of the alternating phases is a twentieth of training, at least one step", "ask for at least 20 steps")
    return tuple(steps * percent // 100 for percent in PERCENT)


def _phases(density: float, steps: int) -> tuple[Phase, ...]:
    """The sparse phases keep the largest weights of all layers together; a dense one begins with all others at zero and no momentum."""
    rate = Cosine(1.0, steps)
    return tuple(
        Phase(
            "sparse" if index % 2 else "dense",
            until=end - begin,
            density=Constant(density if index % 2 else 1.0),
            criterion=Magnitude(),
            allocation=Global(),
            rate=Shifted(rate, begin),
            enter=() if index % 2 or index == 0 else (Afresh(),),
        )
        for index, (begin, end) in enumerate(pairwise(turns(steps)))
    )


AC_DC = TrainRecipe(
    "ac-dc",
    _phases,
    Global(),
    Magnitude(),
    Paper(
        "ac-dc",
        "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks",
        "arXiv 2106.12379",
        (
            "the phases are those of the released 100-epoch ImageNet configuration, as shares of the steps asked for",
            "the learning rate falls by half a cosine from the first step on, without the linear rise of the first five epochs",
            "every site is pruned, the first and the last layer too",
        ),
    ),
)
