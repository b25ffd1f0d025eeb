"""OWL: blocks with more outliers keep more."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Paper, Recipe, Units
from rarefy.core.roles import Allocation
from rarefy.weights.allocations.global_scores import scores_of
from rarefy.weights.allocations.shares import by_wish
from rarefy.weights.criteria.wanda import Wanda
from rarefy.weights.patterns.unstructured import PerRow
from rarefy.weights.solvers.keep import Keep


def block_of(name: str) -> str:
    """The block that a state-dict key belongs to: the path up to its first numeric component, else the key itself.

    >>> block_of("model.layers.3.mlp.up_proj.weight"), block_of("lm_head.weight")
    ('model.layers.3', 'lm_head.weight')
    """
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
    return found[0] if found else name


def outlier_share(scores: Tensor, multiple: float) -> float:
    """The fraction of scores above `multiple` times their mean.

    >>> outlier_share(torch.tensor([1., 1., 1., 97.]), 3.0)
    0.25
    """
    return float((scores > multiple * scores.mean()).float().mean())


@dataclass(frozen=True)
class OutlierShare(Allocation):
    """A block's density follows its share of outlier scores; all matrices of a block share it.

    ``D_b = share(s > multiple * mean s)``, ``p_b = p + r_b - mean r``, ``r_b = 2 spread (D_b - min D) / (max D - min D)``

    `counts` takes units, the total and `scores` {units name: tensor of the units' shape}; returns counts that add up
    to it exactly. The units of one block are those whose state-dict paths agree up to the first number (`block_of`).
    `multiple` is the paper's M, `spread` its lambda: the densities of a model span 2 * spread.

    Raises:
        BadInput: spread below 0 or a multiple not above 0, no scores for a unit, NaN scores, or a budget outside the
            sum of floors and the sum of caps.

    Source: Yin et al., Outlier Weighed Layerwise Sparsity (OWL), arXiv 2310.05175, section 3.3: one density for each
    transformer block, D over all scores of the block's matrices together. The rescaling is that of the authors' code
    (luuyin/OWL, lib/prune_all.py): ``(D - min D) / (max D - min D) * 2 lambda``, minus its mean, plus the density.
    Our mean is weighted by block size, so that unequal blocks keep the total.

    >>> units = [Units(f"layers.{i}.w", (1, 10), ()) for i in range(2)]
    >>> scores = {"layers.0.w": torch.ones(1, 10), "layers.1.w": torch.tensor([[1.] * 9 + [100.]])}
    >>> OutlierShare(spread=0.1).counts(units, 10, scores=scores)
    {'layers.0.w': 4, 'layers.1.w': 6}
    """

    multiple: float = 5.0
    spread: float = 0.08
    name = "outlier-share"

    def __post_init__(self) -> None:
        if self.spread < 0 or self.multiple <= 0:
            raise BadInput(f"multiple {self.multiple}, spread {self.spread}", "the multiple is positive and the spread is not negative", "the paper uses 5 and 0.08")

    def counts(self, units: Sequence[Units], budget: int, *, scores: Mapping[str, Tensor]) -> dict[str, int]:
        offsets = self._offsets(units, scores)
        density = budget / max(sum(u.numel for u in units), 1)
        wishes = [u.numel * min(max(density + offsets[block_of(u.name)], 0.0), 1.0) for u in units]
        return by_wish(units, wishes, budget)

    def _offsets(self, units: Sequence[Units], scores: Mapping[str, Tensor]) -> dict[str, float]:
        """{block: density above the mean}, zero on average over the weights."""
        blocks: dict[str, list[Tensor]] = {}
        for unit in units:
            blocks.setdefault(block_of(unit.name), []).append(scores_of(unit, scores))
        sizes = torch.tensor([sum(s.numel() for s in parts) for parts in blocks.values()], dtype=torch.float64)
        flat = [torch.cat(parts) for parts in blocks.values()]
        if any(bool(torch.isnan(s).any()) for s in flat):
            raise BadInput("scores with NaN", "a score must be a number", "check the calibration data for NaN or inf")
        shares = torch.tensor([outlier_share(s, self.multiple) if s.numel() else 0.0 for s in flat], dtype=torch.float64)
        width = float(shares.max() - shares.min()) if len(flat) else 0.0
        raised = (shares - shares.min()) * (2 * self.spread / width) if width > 0 else torch.zeros_like(shares)
        mean = float((raised * sizes).sum() / sizes.sum().clamp(min=1.0))
        return {block: float(value) - mean for block, value in zip(blocks, raised, strict=True)}


OWL = Recipe(
    "owl",
    Keep(Wanda()),
    OutlierShare(),
    PerRow(),
    paper=Paper(
        "owl",
        "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
        "arXiv 2310.05175",
        (
            "the mean over blocks is weighted by their size; the authors' code weighs blocks alike",
            "as in the authors' code, densities span exactly 2 lambda: one outlying block may be more than lambda from the mean, which the paper's text rules out",
        ),
    ),
)
