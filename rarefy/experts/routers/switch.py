"""Switch routing: one expert per row, weighted by its probability so that the router learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.overflow.capacity import Capacity
from rarefy.experts.routing import per_row, probabilities, row_major


@dataclass(frozen=True)
class Switch(Choice):
    """Send each row to its likeliest expert: ``i = argmax p, y = p_i E_i(x), p = softmax(logits)``.

    Scores with logits [R, E] -> Routing with k = 1. The weight is not renormalised: it carries the router's gradient.
    Source: Fedus et al., Switch Transformers, arXiv 2101.03961, eqs. 1-2 with k = 1.

    >>> r = Switch()(Scores(torch.tensor([[0.0, 0.0], [0.0, 50.0]])), Context())
    >>> r.expert.tolist()[1], r.weight.tolist()
    (1, [0.5, 1.0])
    """

    name = "switch"
    paper = Paper(
        "switch",
        "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
        "arXiv 2101.03961",
        ("distillation to a dense model is not built in",),
    )

    balances = (LoadBalance(),)
    overflow = Capacity()

    def __call__(self, scores: Scores, context: Context) -> Routing:
        weight, expert = probabilities(scores.logits, context.live).max(-1, keepdim=True)
        return row_major(scores, context, expert, weight)

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return {"at most one expert per row": bool((per_row(routing) <= 1).all())}


@torch.no_grad()
def small_init(module: nn.Module, scale: float = 0.1, generator: Generator | None = None) -> None:
    """Draw every matrix [..., fan_in] anew: truncated normal, ``std = sqrt(scale / fan_in)``, cut at two std.

    Source: arXiv 2101.03961, section 2.4: a scale of 0.1, ten times below the usual 1, trains stably.
    """
    for parameter in module.parameters():
        if parameter.dim() > 1:
            _truncated(parameter, (scale / parameter.shape[-1]) ** 0.5, generator)


def _truncated(tensor: Tensor, std: float, generator: Generator | None) -> None:
    nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std, generator=generator)
