"""Product keys: every head finds its k best of n squared single-neuron experts in two searches among n."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.ambient import Seat, aligned
from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Context, Paper, Routing
from rarefy.core.roles import Layer
from rarefy.core.trace import Tap, replaying
from rarefy.experts.banks.singletons import Singletons
from rarefy.experts.routing import unpadded


def best_pairs(first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of all sums ``first[..., i] + second[..., j]`` and their numbers ``i n + j``, largest first: two of [..., k].

    Exact, for no pair can be among the k best unless i is among the k best of the first and j of the second: ``k^2`` sums are made, not ``n^2``.

    >>> value, index = best_pairs(torch.tensor([1.0, 5.0, 2.0]), torch.tensor([0.5, 0.0, 0.2]), 2)
    >>> value.tolist(), index.tolist()
    ([5.5, 5.199999809265137], [3, 5])
    """
    n = first.shape[-1]
    kept = min(k, n)
    one, i = first.sort(stable=True, dim=-1, descending=True)
    other, j = second.sort(stable=True, dim=-1, descending=True)
    sums = (one[..., :kept, None] + other[..., None, :kept]).flatten(-2)
    number = (i[..., :kept, None] * n + j[..., None, :kept]).flatten(-2)
    value, place = sums.sort(stable=True, dim=-1, descending=True)
    return value[..., :k], number.gather(-1, place[..., :k])


class QueryNorm(nn.Module):
    """Batch normalisation of queries [R, q] over the rows that are not padding: in training by their own mean and variance, else by running ones.

    A gain and a shift per channel; the running figures move by a tenth a forward, and not when a checkpointed forward is recomputed.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, q: Tensor, valid: Tensor | None) -> Tensor:
        mean, variance = self.mean, self.variance
        if self.training and q.shape[0]:
            mean, variance = self._measured(q, torch.ones(len(q), device=q.device) if valid is None else valid.reshape(-1).to(q))
        return (q - mean) * (variance + 1e-5).rsqrt() * self.gain + self.shift

    def _measured(self, q: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        count = real.sum().clamp(min=1)
        mean = (q * real[:, None]).sum(0) / count
        variance = ((q - mean).square() * real[:, None]).sum(0) / count
        if not replaying():
            with torch.no_grad():
                self.mean.lerp_(mean.detach().to(self.mean), 0.1)
                self.variance.lerp_(variance.detach().to(self.variance), 0.1)
        return mean, variance


class Retrieval(nn.Module):
    """h heads that each find k of n^2 experts of one table and add up what these make of the row; x [..., d] -> [..., d].

    ``q_h = norm(W_h x)`` in two halves of q / 2, scores ``q_h1 . K1_h[i] + q_h2 . K2_h[j]`` of expert ``i n + j``, weights a softmax over the
    k best, in float32; ``y = sum_h sum_k w act(u . x) v``. Experts are one table for all heads, keys are each head's own.
    """

    def __init__(self, width: int, n: int, heads: int, k: int, query: int) -> None:
        super().__init__()
        self.heads, self.k, self.seat, self.tap = heads, k, Seat(), Tap()
        self.query, self.norm = nn.Parameter(torch.randn(heads * query, width) / width**0.5), QueryNorm(heads * query)
        self.keys = nn.Parameter(torch.randn(2, heads, n, query // 2) / (query // 2) ** 0.5)
        self.bank = Singletons(n * n, width)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        context = replace(aligned(self.seat() if context is None else context, rows.shape[0]), training=self.training)
        if context.live is not None:
            raise Refused("live experts of product keys", "a dead expert cannot be left out of both searches", "leave live unset")
        routing = self.tap(self._retrieved(rows, context), context, rows)
        m = self.heads * self.k
        y = self.bank.summed(rows, routing.expert.view(len(rows), m), routing.weight.view(len(rows), m))
        return y.to(x.dtype).reshape(x.shape)

    def _retrieved(self, rows: Tensor, context: Context) -> Routing:
        with torch.autocast(rows.device.type, enabled=False):
            q = self.norm(rows.float() @ self.query.float().T, context.valid)
            halves = q.view(len(rows), self.heads, 2, self.keys.shape[-1])
            first, second = torch.einsum("rhsq,shnq->srhn", halves, self.keys.float())
            value, expert = best_pairs(first, second, self.k)
            found = Routing(expert.flatten(), value.softmax(-1).flatten(), len(rows), self.bank.experts, self.heads * self.k)
        return unpadded(found, context.valid)


@dataclass(frozen=True)
class ProductKeys(Layer):
    """Replace a feed-forward block by `heads` searches among single-neuron experts, k each: parameters grow with E, cost with its root.

    E is a square n^2, and an expert has one inner unit, whatever `inner` says; `query` (None: the row's width, made even) is a query's width.
    A row costs ``O((n + k^2) query + k d)`` a head and touches ``2 k d`` expert parameters. Queries are normalised over the batch, which spreads them
    over the experts: in training what a row gets depends on the others. There is no balance loss, and no expert drops a row. With k = 1 the only weight of a head is 1,
    and its query and keys do not learn.
    Source: He, Mixture of A Million Experts, arXiv 2407.04153 (8 heads of 16 among 1024^2), with lucidrains/PEER-pytorch.

    Raises:
        BadInput: heads, k or query below 1; from `make`, experts that are no square, or fewer than k.

    >>> ProductKeys(heads=2, k=3).make(6, 16, 1)(torch.randn(2, 7, 6)).shape
    torch.Size([2, 7, 6])
    """

    name = "product-keys"
    paper = Paper(
        "peer",
        "Mixture of A Million Experts",
        "arXiv 2407.04153",
        (
            "the equations rest on a third party's code and on summaries of the paper that agree; the paper was not read, and its initialisation is ours",
            "scores that do not compete (a sigmoid of each) are left out",
            "gradients of the two tables are dense tensors, so that a step costs their size: use a table that fits",
            "a dead expert is refused, and which of two equal sums comes first is by the order of the halves",
            "its language models were not trained",
        ),
    )
    parts = (Singletons,)
    heads: int = 8
    k: int = 16
    query: int | None = None

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(2, 2), cls(1, 4, 6), cls(3, 3))

    def __post_init__(self) -> None:
        if min(self.heads, self.k) < 1 or (self.query is not None and (self.query < 2 or self.query % 2)):
            raise BadInput(f"{self!r}", "there is a head, it finds an expert, and its query has two halves", "pass for example heads=8, k=16, query=64")

    def make(self, width: int, experts: int, inner: int, /) -> nn.Module:
        n = isqrt(experts)
        if n * n != experts or experts < self.k:
            raise BadInput(f"{experts} experts for {self.k} per head", "experts are a square, and at least k", "pass for example experts=1024")
        return Retrieval(width, n, self.heads, self.k, self.query or width + width % 2)

    def causal(self, training: bool) -> bool:
        return not training
