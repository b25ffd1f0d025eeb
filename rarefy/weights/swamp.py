"""SWAMP: iterative magnitude pruning, where several particles are trained from every ticket and their average is pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rarefy.core.errors import BadInput
from rarefy.core.records import Paper, Phase, TrainRecipe
from rarefy.weights.actions import Remember, Rewind
from rarefy.weights.allocations.global_scores import Global
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.replicas import Collect, Forget, RecalibrateNorms
from rarefy.weights.rewind import longest, rounds
from rarefy.weights.schedules.constant import Constant
from rarefy.weights.schedules.cosine import Cosine
from rarefy.weights.schedules.linear import Linear
from rarefy.weights.schedules.shifted import Shifted

PAPER = Paper(
    "swamp",
    "SWAMP: Sparse Weight Averaging with Multiple Particles for Iterative Magnitude Pruning",
    "arXiv 2305.14852",
    (
        "particles are trained one after the other and share the steps asked for; they differ in their batches alone",
        "four particles, and the average over the last quarter of a training at half the learning rate, are from memory; all are fields",
        "the learning rate falls in a line to that half; iterates are averaged at four moments in place of every epoch",
        "the rounds take equal shares of what is left, at most a fifth, so that the last meets the density exactly",
        "training goes back to a tenth of a round, where the paper goes back to a number of epochs that it searches for",
        "batch norms are measured anew on the calibration batches, before every pruning and at the end",
    ),
)


@dataclass(frozen=True)
class Swamp:
    """The phases of SWAMP: train a little, remember; then per round train particles from there, average all, prune the average, go back.

    ``w = 1/(N S) sum_n sum_s w_ns``: N particles from one ticket, each seen at S moments of its last part; the mask is of w

    One particle and no part that is averaged is iterative magnitude pruning with rewinding, bit for bit.

    Args:
        particles: N, each trained on other batches.
        averaged: the part of a training, at its end, over which iterates are averaged; 0: its last weights alone.
        iterates: S.
        rate: factor on the learning rate in that part; it falls to it in a line. Without such a part it falls by half a cosine to 0.
        early: the part of a training after which all particles begin.

    Raises:
        BadInput: too few steps for every iterate to be a step apart.

    Source: Choi, Lee, Nam and Lee, arXiv 2305.14852.

    >>> [p.name for p in Swamp(particles=2, averaged=0)(0.8, 100)]
    ['start', 'particle 1', 'particle 2', 'prune', 'particle 1', 'particle 2', 'average']
    """

    particles: int = 4
    averaged: float = 0.25
    iterates: int = 4
    rate: float = 0.5
    early: float = 0.1

    def __call__(self, density: float, steps: int) -> tuple[Phase, ...]:
        count = rounds(density)
        trainings = self.particles * (count + 1)
        length = longest(steps, trainings, self.early)
        early, tail = int(self.early * length), int(self.averaged * length) // self.iterates
        if length - early < 1 or (self.averaged and tail < 1):
            needed = int((1 + trainings) * max(2, self.iterates / self.averaged if self.averaged else 2))
            raise BadInput(f"{steps} steps", f"{trainings} trainings of particles to density {density} need a step for each part", f"ask for at least {needed} steps")
        spare = steps - early - trainings * (length - early)
        phases = [Phase("start", until=early + spare, rate=self._rate(length, tail))]
        for k in range(count + 1):
            if k:
                phases.append(Phase("prune", until=0, density=Constant(density ** (k / count)), criterion=Magnitude(), allocation=Global(), enter=_AVERAGED))
            for number in range(self.particles):
                phases += self._particle(number, length, early, tail, (Remember(),) if not k and not number else _BACK if not number else _NEXT)
        return (*phases, Phase("average", enter=_AVERAGED))

    def _rate(self, length: int, tail: int) -> Any:
        return Linear(1.0, self.rate, length - tail * self.iterates) if tail else Cosine(1.0, length)

    def _particle(self, number: int, length: int, early: int, tail: int, enter: tuple[Any, ...]) -> list[Phase]:
        """One training from the early weights on, its last part cut where iterates join the average."""
        name, first = f"particle {number + 1}", length - early - tail * (self.iterates - 1)
        rate = Shifted(self._rate(length, tail), early)
        parts = [Phase(name, until=first, rate=rate, enter=enter)]
        return parts + [Phase(name, until=tail, rate=Constant(self.rate), enter=(Collect("mean"),)) for _ in range(self.iterates - 1) if tail]


_BACK = (Rewind(),)
_NEXT = (Collect("mean"), Rewind())
_AVERAGED = (Collect("mean"), Rewind("mean"), Forget("mean"), RecalibrateNorms())

SWAMP = TrainRecipe("swamp", Swamp(), Global(), Magnitude(), PAPER)
