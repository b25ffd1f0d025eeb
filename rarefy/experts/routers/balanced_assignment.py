"""BASE: in training every expert gets the same number of rows, by solving an assignment problem; outside it the best expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.experts.banks.residual import ResidualStack
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.solvers.balanced import balanced
from rarefy.experts.routing import alive, real_rows


def centres(width: int, experts: int, gain: float = 0.1) -> Linear:
    """A linear router whose matrix, the experts' centres [E, d], is orthogonal with rows of length `gain`.

    Source: the implementation of arXiv 2103.16716, fairseq's base_layer.py.

    >>> centres(8, 4).weight.norm(dim=1).detach().allclose(torch.tensor(0.1))
    True
    """
    router = Linear(width, experts)
    nn.init.orthogonal_(router.weight, gain=gain)
    return router


@dataclass(frozen=True)
class BalancedAssignment(Choice):
    """Send each row to one expert: in training ``pi = argmax sum_r a[r, pi(r)]`` with T/E rows each, else ``argmax a``; weight ``sigmoid(a)``.

    Scores with logits a [R, E] -> Routing with k = 1. No balance loss and no capacity is needed. The assignment passes no gradient; the
    weight does, and it is the router's only one. `chunk` solves for so many rows at a time, drawn at random in training: shorter
    problems, and rows of one text are spread over them. Padding gets nobody; of equals the lower index.
    With a bank whose experts return ``f(x) - x`` (`ResidualStack`) and the host's residual ``x + layer(x)`` this is ``alpha f(x) + (1 - alpha) x``.

    Not causal in training: a row's expert depends on the rows after it. Outside training each row is on its own: report both losses.
    Source: Lewis et al., arXiv 2103.16716, section 3, and fairseq's base_layer.py (where eq. 1 counts the residual of f once). We solve exactly, where they run an auction to a tolerance.

    Raises:
        BadInput: a chunk below 1.

    >>> logits = torch.tensor([[2.0, 0.0], [3.0, 0.0], [1.0, 0.0], [9.0, 0.0]])
    >>> [BalancedAssignment()(Scores(logits), Context(training=t)).expert.tolist() for t in (True, False)]
    [[1, 0, 1, 0], [0, 0, 0, 0]]
    """

    name = "balanced-assignment"
    paper = Paper(
        "base-layers",
        "BASE Layers: Simplifying Training of Large, Sparse Models",
        "arXiv 2103.16716",
        (
            "rows are shuffled over the chunks of one device, not over workers; gradient clipping by the norm of the shared parameters is left to the training loop",
            "where the experts do not divide the rows an expert may get fewer",
            "the paper's language models were not trained",
        ),
    )
    affinity = staticmethod(centres)
    bank = ResidualStack
    chunk: int | None = None

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(), cls(chunk=8))

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise BadInput(f"chunk {self.chunk}", "a chunk has at least one row")

    def __call__(self, scores: Scores, context: Context) -> Routing:
        a = scores.logits
        expert = self._solve(a, context) if context.training else _best(a, context)
        weight = a.gather(1, expert.clamp(max=a.shape[1] - 1)[:, None]).squeeze(1).sigmoid()
        return Routing(expert, weight.masked_fill(expert == a.shape[1], 0.0), a.shape[0], a.shape[1], 1, scores=scores)

    def causal(self, training: bool) -> bool:
        return not training

    def _solve(self, a: Tensor, context: Context) -> Tensor:
        if self.chunk is None or a.shape[0] <= self.chunk:
            return balanced(a, context.valid, context.live)
        valid = real_rows(a, context.valid)
        shuffled = torch.randperm(a.shape[0], device=a.device)
        shuffled = shuffled[(~valid[shuffled]).int().argsort(stable=True)]  # padding last, so that it takes no place in a chunk
        parts = [balanced(a[rows], valid[rows], context.live) for rows in shuffled.split(self.chunk)]
        return torch.empty_like(shuffled).scatter(0, shuffled, torch.cat(parts))


def _best(a: Tensor, context: Context) -> Tensor:
    seen = a.detach() if context.live is None else a.detach().masked_fill(~context.live, float("-inf"))
    expert = alive(seen.max(-1).indices, context.live)
    return expert if context.valid is None else expert.where(context.valid.reshape(-1), a.shape[1])
