"""Expert prototyping: the experts in k groups, and one top-1 router in each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.experts.overflow.capacity import Capacity
from rarefy.experts.routing import per_row, probabilities, row_major


@dataclass(frozen=True)
class Prototypes(Choice):
    """Choose the likeliest expert of each of k groups: ``y = sum_z p_z E_z(x)``, p_z the largest of a softmax within group z.

    Scores with logits [R, E], group z being the experts zE/k .. (z+1)E/k - 1 -> Routing of R*k assignments, group by group. The rows of
    a linear router's matrix that score one group are that group's router: no group sees another's logits. Weights are not renormalised.
    `Capacity(c)` gives each expert the places that c gives it in k top-1 layers; `Capacity(c / k)` the cost of one top-1 layer.
    Source: Yang et al., M6-T, arXiv 2105.15082, the section on expert prototyping.

    Raises:
        BadInput: E is not a multiple of k.

    >>> Prototypes(2)(Scores(torch.tensor([[0.0, 1.0, 9.0, 8.0]])), Context()).expert.tolist()
    [1, 2]
    """

    name = "prototypes"
    paper = Paper(
        "m6t-prototyping",
        "M6-T: Exploring Sparse Expert Models and Beyond",
        "arXiv 2105.15082",
        (
            "the grouping and the sum over groups were read in the abstract and in accounts of the paper, the weight p in one of them; the full text was not at hand",
            "no balance loss by default: the paper finds that one changes the load and not the quality",
            "routing within attention and the training of a trillion parameters are not built in",
        ),
    )
    overflow = Capacity()
    k: int = 2

    def __call__(self, scores: Scores, context: Context) -> Routing:
        experts = scores.logits.shape[1]
        if self.k < 1 or experts % self.k:
            raise BadInput(f"k = {self.k} with {experts} experts", "the groups of experts are equally large", "choose a k that divides the number of experts")
        groups = scores.logits.unflatten(1, (self.k, experts // self.k))
        weight, inside = probabilities(groups, None if context.live is None else context.live.view(self.k, -1)).max(-1)
        return row_major(scores, context, inside + torch.arange(0, experts, experts // self.k, device=inside.device), weight)

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        chosen, at = routing.expert.view(-1, self.k), torch.arange(self.k, device=routing.expert.device)
        in_group = (chosen // (routing.experts // self.k) == at) | (chosen == routing.experts)
        return {"one expert of each group": bool(in_group.all()), f"at most {self.k} experts per row": bool((per_row(routing) <= self.k).all())}
