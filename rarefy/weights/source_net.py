"""A random source network: chance draws a support before training, and everything later happens inside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from rarefy.core.discover import methods, pick
from rarefy.core.errors import BadInput
from rarefy.core.records import Paper, Phase, TrainRecipe
from rarefy.core.roles import Allocation
from rarefy.weights.actions import Confine, ScaleToFanIn
from rarefy.weights.allocations.erdos_renyi import ERK
from rarefy.weights.allocations.global_scores import Global
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.criteria.random import Random
from rarefy.weights.rewind import IMP
from rarefy.weights.schedules.constant import Constant


@dataclass(frozen=True)
class SourceNet:
    """A random support of a density, its layers' shares by an allocation; `inside` makes a recipe stay in it.

    ``mask_t`` is a part of ``mask_0 ~ chance(density)`` at every later t; kept rows are scaled to the inputs that they kept

    Where a recipe passes through densities above the source's, all of the source is kept there.

    Raises:
        BadInput: a density outside (0, 1].

    Source: Gadhikar, Mukherjee and Burkholz, Why Random Pruning Is All We Need to Start Sparse, arXiv 2210.02412.

    >>> SourceNet(0.5).inside(IMP).phases(0.1, 300)[0].density
    Constant(value=0.5)
    """

    density: float = 0.5
    allocation: Allocation = field(default_factory=ERK)

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise BadInput(f"a source network of density {self.density}", "its density lies in (0, 1]")

    @staticmethod
    def parse(text: str) -> SourceNet:
        """`allocation:density`, or a density alone.

        >>> SourceNet.parse("balanced:0.2")
        SourceNet(density=0.2, allocation=Balanced())
        """
        name, _, density = text.rpartition(":")
        try:
            value = float(density)
        except ValueError as error:
            raise BadInput(f"a source network {text!r}", "it is a density, or an allocation and a density", "write for example 0.5 or balanced:0.5") from error
        return SourceNet(value, pick(methods(Allocation), name, "allocation")()) if name else SourceNet(value)

    def inside(self, recipe: TrainRecipe) -> TrainRecipe:
        """The recipe, begun in this source network and confined to it."""

        def phases(density: float, steps: int) -> tuple[Phase, ...]:
            return (*self.before(density), *recipe.phases(density, steps))

        return replace(recipe, phases=phases)

    def before(self, density: float) -> tuple[Phase, ...]:
        """The phases of no steps that draw the support and confine to it a training that ends at `density`.

        Raises:
            BadInput: more is to be kept in the end than the source holds.
        """
        if density > self.density:
            raise BadInput(f"density {density} within a source network of density {self.density}", "what is kept is a part of the source", "ask for less, or a denser source")
        draw = Phase("source", until=0, density=Constant(self.density), criterion=Random(), allocation=self.allocation)
        return draw, Phase("confine", until=0, enter=(Confine(), ScaleToFanIn()))


def copies(density: float, failure: float) -> float:
    """How many parallel edges must be drawn so that one of them exists but with probability `failure`.

    ``log(1 / failure) / log(1 / (1 - density))``, since ``P(at least one of c) = 1 - (1 - density)^c``

    >>> round(copies(0.5, 0.125), 9)
    3.0
    """
    return math.log(1 / failure) / math.log(1 / (1 - density))


ER_SOURCE = replace(
    SourceNet(0.5).inside(IMP),
    name="er-source-nets",
    allocation=Global(),
    criterion=Magnitude(),
    paper=Paper(
        "er-source-nets",
        "Why Random Pruning Is All We Need to Start Sparse",
        "arXiv 2210.02412",
        (
            "exact counts instead of Bernoulli draws",
            "what a layer too small for its balanced share cannot take goes to the others instead of being lost",
            "rows are scaled to the inputs that they kept, where the authors draw anew from the density",
            "dead paths are not repaired",
            "inside the source: iterative magnitude pruning here, and any other training recipe by --within; edge-popup is not among them",
            "how little a random half loses depends on how long is trained: on digits at 5%, four seeds, from dense, a half and 8%: 0.889, 0.892, 0.667 at 64 wide and 0.923, 0.913, 0.878 at 128 after 1,600 steps; with half of them, a half lost 5 points at 128",
        ),
    ),
)
