"""Expert choice: every expert takes the rows that score highest on it, so that the load is even by construction."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.experts.routers.solvers.capped import capped
from rarefy.experts.routing import alive, probabilities, real_rows


@dataclass(frozen=True)
class ExpertChoice(Choice):
    """Let each expert take its ``C = ceil(T c / E)`` best rows: ``S = softmax over experts, I_e = top_C S[:, e], w = S[I_e, e]``.

    Scores with logits [R, E] -> Routing of E*C assignments: a row gets 0 to E experts, and one without any comes out as zeros.
    T counts the rows that are not padding, of each group on its own where `group` names the context's field that tells groups
    apart: "owner" (a sequence) or "positions" (a time step). `limit` bounds the experts of a row (the paper's EC-CAP): experts then
    take the top C of a soft assignment that obeys it, so that after rounding a row may exceed it. Of equals the lower row goes first.

    Not causal: which experts a row gets depends on the rows after it. Only groups of one time step each keep the past from
    seeing the future, and there too a row depends on the rest of its batch; in generation each step is a group of its own.
    Source: Zhou et al., arXiv 2202.09368, eqs. 1-4 (weights not renormalised) and section 3.3. We round C up, so that a group too small gets experts.

    Raises:
        BadInput: a factor that is not positive, a limit below it (no assignment obeys both), a group that is not a field, or not given.

    >>> r = ExpertChoice(1.0)(Scores(torch.tensor([[9.0, 0.0], [8.0, 0.0], [1.0, 0.0], [0.0, 0.0]])), Context())
    >>> r.expert.tolist(), r.rows().tolist()
    ([0, 0, 1, 1], [0, 1, 3, 2])
    """

    name = "expert-choice"
    paper = Paper(
        "expert-choice",
        "Mixture-of-Experts with Expert Choice Routing",
        "arXiv 2202.09368",
        (
            "the capacity is rounded up where it is no integer",
            "the capped choice cools its entropy term from 1 to the paper's 0.001 over the first 50 of the paper's 100 iterations",
            "the paper's language-model comparison was not run",
        ),
    )
    factor: float = 2.0
    limit: int | None = None
    group: str | None = None
    _ratio: tuple[int, int] = field(default=(0, 1), init=False, repr=False, compare=False)  # the factor, exact in decimal

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(), cls(1.0), cls(1.0, limit=2))

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise BadInput(f"factor {self.factor}", "experts per row on average are a positive number", "pass for example 2.0")
        if self.limit is not None and self.limit < self.factor:
            raise BadInput(f"a limit of {self.limit} with {self.factor} experts per row on average", "a limit is at least the average", "raise the limit")
        if self.group not in (None, "owner", "positions"):
            raise BadInput(f"group {self.group!r}", "a group is a sequence (owner) or a time step (positions)")
        object.__setattr__(self, "_ratio", Fraction(str(self.factor)).as_integer_ratio())

    def __call__(self, scores: Scores, context: Context) -> Routing:
        p = probabilities(scores.logits, context.live)
        rows, experts = p.shape
        index, real = self._groups(p, context)
        most = min(index.shape[1], self._taken(index.shape[1], experts))
        size = real.sum(1)
        take = torch.minimum(self._taken(size, experts), size)
        order = self._ranked(p, index, real, take).argsort(dim=1, descending=True, stable=True)[:, :most]
        taken = (torch.arange(most, device=p.device) < take[:, None])[:, :, None].expand_as(order)
        expert = torch.arange(experts, device=p.device).expand_as(order)
        item = index[:, :, None].expand(-1, -1, experts).gather(1, order)
        weight = p[item, expert] * taken
        expert = alive(expert, context.live).where(taken, experts)
        return Routing(_flat(expert), _flat(weight), rows, experts, item=_flat(item), scores=scores)

    def causal(self, training: bool) -> bool:
        return self.group == "positions"

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        if self.group is not None:
            return {}
        real = routing.items if context.valid is None else int(context.valid.sum())
        live = torch.ones(routing.experts, dtype=torch.bool) if context.live is None else context.live
        share = min(real, self._taken(real, routing.experts)) * live.long()
        return {"every live expert has its share of rows": torch.equal(routing.counts(), share)}

    def _taken(self, rows: Any, experts: int) -> Any:
        above, below = self._ratio
        return -(-above * rows // (below * experts))

    def _groups(self, p: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The rows of every group, [G, M], and which of these places hold a row that is not padding."""
        rows = torch.arange(p.shape[0], device=p.device)
        valid = real_rows(rows, context.valid)
        if self.group is None:
            return rows[None], valid[None]
        key = getattr(context, self.group)
        if key is None:
            raise BadInput(f"expert choice by {self.group}", "the context must give it", "attach an Ambient to the model, or pass a context")
        order = key.reshape(-1).argsort(stable=True)
        _, sizes = key.reshape(-1)[order].unique_consecutive(return_counts=True)
        index = nn.utils.rnn.pad_sequence(list(order.split(sizes.tolist())), batch_first=True, padding_value=-1) if rows.numel() else order[None]
        return index.clamp(min=0), (index >= 0) & valid[index]

    @torch.no_grad()
    def _ranked(self, p: Tensor, index: Tensor, real: Tensor, take: Tensor) -> Tensor:
        """What is ranked, [G, M, E]; places without a row come last."""
        seen = p.detach()[index].masked_fill(~real[:, :, None], float("-inf"))
        return seen if self.limit is None else capped(seen, take, self.limit)


def _flat(by_group: Tensor) -> Tensor:
    """[G, C, E] -> [N], expert by expert."""
    return by_group.permute(2, 0, 1).reshape(-1)
