"""HyperSparse: a growing pull on small weights that squeezes what the net knows into the largest, then one cut and fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.exact import keep_count
from rarefy.core.records import Phase, Progress, TrainRecipe
from rarefy.weights.actions import Rewind
from rarefy.weights.allocations.global_scores import Global
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.penalties import GradientPenalty
from rarefy.weights.schedules.constant import Constant
from rarefy.weights.schedules.drops import Drops
from rarefy.weights.triggers.pruned_beats_dense import PAPER, PrunedBeatsDense

STEEPEST = 0.6585  # atanh(1 / sqrt(3)), where the slope of tanh falls fastest
START = 2e-3  # stronger than the published 5e-6 and 5e-4, for trainings of hundreds of steps
EPOCHS = 2  # of the paper's in one of our rounds, of which there are a hundred in a training


@dataclass(frozen=True)
class HyperSparse(GradientPenalty):
    """Pull on each weight by how small it is beside the smallest that a cut would keep, harder from round to round.

    ``g <- g + strength growth^(t // every) sign(w) s sech^2(s |w|) sum |w| / sum tanh(s |w|),  s = 0.6585 / |w|_(k)``

    |w|_(k) is the k-th of all sites' magnitudes in ascending order from 0, k = d - (how many of d the density keeps), and t the step
    of the phase. It is the gradient, s held constant, of ``sum |w| sum tanh(s |w|) / sg(sum tanh(s |w|)) - sum |w|``, whose
    value is always 0: there is no figure to log. It falls with |w|, and fastest at |w|_(k).

    `edit` takes and returns gradients of the weights' shapes, sites without one among the d; where |w|_(k) is 0 there is
    nothing left to separate, and gradients stay.

    Raises:
        BadInput: a density outside (0, 1].

    Source: Ott et al., arXiv 2308.07163; strength and growth are those of the published code (its table names 5e-4).

    >>> part, w = HyperSparse(density=0.5, strength=1.0), {"a": torch.tensor([1., -0.1])}
    >>> [round(v, 3) for v in part.edit(w, {"a": torch.zeros(2)}, {}, Progress())["a"].tolist()]
    [0.751, -1.121]
    """

    density: float = 0.1
    strength: float = 5e-6
    growth: float = 1.05
    every: int = 100
    name = "hypersparse"
    paper = PAPER

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise BadInput(f"density {self.density}", "hypersparse keeps a fraction of the weights in (0, 1]", "pass for example 0.1")

    def off(self) -> HyperSparse:
        return replace(self, strength=0.0)

    def edit(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], support: Mapping[str, Tensor], progress: Progress) -> dict[str, Tensor]:
        sizes = torch.cat([w.detach().abs().flatten() for w in weights.values()])
        boundary = self._boundary(sizes)
        if float(boundary) == 0.0:
            return dict(gradients)
        s = STEEPEST / boundary
        scale = self._strength(progress) * s * sizes.sum() / torch.tanh(s * sizes).sum()
        return {key: g + scale * weights[key].detach().sign() / torch.cosh(s * weights[key].detach()).square() for key, g in gradients.items()}

    def _boundary(self, sizes: Tensor) -> Tensor:
        below = min(sizes.numel() - keep_count(sizes.numel(), self.density), sizes.numel() - 1)
        return sizes.kthvalue(below + 1).values

    def _strength(self, progress: Progress) -> float:
        return float(self.strength * self.growth ** (progress.phase_step // self.every))


def _phases(density: float, steps: int) -> tuple[Phase, ...]:
    """A fifth dense, up to two fifths regularised, the rest fine-tuning of the best that a cut left."""
    every, warm = max(1, steps // 100), steps // 5
    stop = PrunedBeatsDense(density, every=every, limit=2 * steps // 5 // every)
    pull = HyperSparse(density, strength=START, growth=HyperSparse.growth**EPOCHS, every=every)
    return (
        Phase("dense", until=warm),
        Phase("squeeze", until=stop, penalties=(pull,)),
        Phase("fine-tune", density=Constant(density), criterion=Magnitude(), allocation=Global(), rate=Drops(), enter=(Rewind(stop.best),)),
    )


HYPERSPARSE = TrainRecipe("hypersparse", _phases, Global(), Magnitude(), PAPER)
