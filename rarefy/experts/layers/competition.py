"""Competition: on some steps all experts answer, those that answer loudest serve the row, and a router learns to tell who they will be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, finfo, nn
from torch.optim import Optimizer

from rarefy.core.ambient import Seat, aligned
from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Entry, Paper, Routing, Scores
from rarefy.core.roles import Affinity, Bank, Controller, Layer
from rarefy.core.trace import Tap
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.banks.ffn import FFN
from rarefy.experts.dispatch import dispatch
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.topk import TopK
from rarefy.experts.routing import need_k, ranked, row_major


class Competing(nn.Module):
    """A routed layer whose experts compete while `competes`, in training: ``a_e = ||E_e(x)||_2, y = sum of the k largest, softmax(a) over them``.

    x [..., d] -> [..., d]. On such a step every expert runs once over every row that is not padding, and the router z = W x is taught:
    `losses["distillation"]` is `strength` times the mean square of ``softmax(z) - t`` over rows and experts, t the softmax of a over all
    experts where one is among the k, else 0, and a constant. Otherwise, and outside training always, the router's k likeliest serve the row.
    """

    def __init__(self, affinity: Affinity, bank: Bank, choice: TopK, strength: float) -> None:
        super().__init__()
        self.affinity, self.bank, self.seat, self.tap = affinity, bank, Seat(), Tap()
        self.choice, self.strength, self.competes = choice, strength, False

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        context = replace(aligned(self.seat() if context is None else context, rows.shape[0]), training=self.training)
        scores: Scores = self.affinity(rows, context, self.bank)
        if not (self.competes and self.training):
            routing = self.tap(self.choice(scores, context), context, rows)
            return dispatch(rows, routing, self.bank, context).reshape(x.shape)
        outputs = self._everyone(rows, context)
        routing = self.tap(self._contest(outputs, scores, context), context, rows)
        return _served(outputs, routing).to(x.dtype).reshape(x.shape)

    def _everyone(self, rows: Tensor, context: Context) -> Tensor:
        """What every expert makes of every row that is not padding, [R, E, d]; zeros of padding."""
        real = rows if context.valid is None else rows[context.valid.reshape(-1)]
        each = torch.stack([expert(real) for expert in self.bank.split()], 1)
        if context.valid is None:
            return each
        return each.new_zeros(rows.shape[0], *each.shape[1:]).index_put((context.valid.reshape(-1).nonzero().flatten(),), each)

    def _contest(self, outputs: Tensor, scores: Scores, context: Context) -> Routing:
        a = affinities(outputs)
        if context.live is not None:
            a = a.masked_fill(~context.live, finfo(a.dtype).min)
        value, expert = (t[:, : self.choice.k] for t in ranked(a)[:2])
        losses = {**scores.losses, "distillation": self.strength * self._lesson(scores.logits, a, expert, context)}
        return row_major(replace(scores, losses=losses), context, expert, value.softmax(-1))

    def _lesson(self, logits: Tensor, a: Tensor, winners: Tensor, context: Context) -> Tensor:
        """The mean square of what the router says less who won, over rows that are not padding."""
        wrong = (logits.softmax(-1) - target(a, winners)).square().mean(-1)
        if context.valid is None:
            return wrong.mean() if wrong.numel() else wrong.sum()
        return (wrong * context.valid.reshape(-1)).sum() / context.valid.sum().clamp(min=1)


def affinities(outputs: Tensor) -> Tensor:
    """How loud each expert's answer is, float32 [R, E] of [R, E, d].

    >>> affinities(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])).tolist()
    [[5.0, 0.0]]
    """
    return torch.linalg.vector_norm(outputs.float(), dim=-1)


def target(a: Tensor, winners: Tensor) -> Tensor:
    """What the router is to say, [R, E]: the softmax of a [R, E] at the winners [R, k], elsewhere 0; no gradient.

    >>> target(torch.zeros(1, 4), torch.tensor([[2, 0]])).tolist()
    [[0.25, 0.0, 0.25, 0.0]]
    """
    p = a.detach().softmax(-1)
    return torch.zeros_like(p).scatter(1, winners, p.gather(1, winners))


def _served(outputs: Tensor, routing: Routing) -> Tensor:
    """The weighted sum of the winners' answers, [R, d]."""
    k = routing.k or 1
    expert = routing.expert.view(-1, k).clamp(max=routing.experts - 1)
    chosen = outputs.gather(1, expert[:, :, None].expand(-1, -1, outputs.shape[-1]))
    return (chosen * routing.weight.view(-1, k, 1)).sum(1)


@dataclass(frozen=True)
class Coins(Controller):
    """Before every step toss a coin for every layer of `Competing`: heads by `rate`, once `warmup` steps are over, and for at most `most` layers.

    Where more layers than `most` have heads, those with the smallest draws compete. The coins are a function of the seed and the step alone:
    the same on every process, and after a stop. Source: Pham et al., CompeteSMoE, arXiv 2402.02526 and 2505.13380 (the cap).

    Raises:
        BadInput: a rate outside [0, 1], a negative warm-up, `most` below 1.
    """

    name = "coins"
    rate: float = 0.1
    warmup: int = 0
    most: int | None = None
    seed: int = 0

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(0.5), cls(1.0, warmup=1), cls(1.0, most=1))

    def __post_init__(self) -> None:
        if not (0 <= self.rate <= 1 and self.warmup >= 0 and (self.most is None or self.most >= 1)):
            raise BadInput(f"{self!r}", "a rate lies in [0, 1], a warm-up is not negative, and at least one layer may compete")

    def heads(self, step: int, paths: Sequence[str]) -> list[str]:
        """The layers that compete at a step.

        >>> Coins(1.0, warmup=1, most=2).heads(0, "abc"), len(Coins(1.0, warmup=1, most=2).heads(1, "abc"))
        ([], 2)
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        drawn = dict(zip(sorted(paths), torch.rand(len(paths), generator=generator).tolist(), strict=True))
        found = sorted((path for path, value in drawn.items() if value < self.rate and step >= self.warmup), key=drawn.__getitem__)
        return sorted(found[: self.most])

    def start(self, layers: Mapping[str, Any]) -> dict[str, Any]:
        return self._toss(0, layers)

    def resume(self, state: dict[str, Any], layers: Mapping[str, Any]) -> None:
        for path, layer in _competing(layers).items():
            layer.competes = path in state["competing"]

    def after_step(self, state: dict[str, Any], layers: Mapping[str, Any], entries: Sequence[Entry], optimizer: Optimizer) -> dict[str, Any]:
        return self._toss(state["step"] + 1, layers)

    def _toss(self, step: int, layers: Mapping[str, Any]) -> dict[str, Any]:
        state = {"step": step, "competing": self.heads(step, list(_competing(layers)))}
        self.resume(state, layers)
        return state


def _competing(layers: Mapping[str, Any]) -> dict[str, Competing]:
    return {path: layer for path, layer in layers.items() if isinstance(layer, Competing)}


@dataclass(frozen=True)
class Competition(Layer):
    """Experts that compete by the norm of what they answer on a share `rate` of the steps, and a router that learns who wins.

    ``y = sum over the k winners of softmax(a)_e E_e(x)`` on those steps, else top-k by the router, weights renormalised; see `Competing` and
    `Coins`. The layer costs E experts per row on a competing step and k on all others; outside training it is a plain top-k layer.
    Source: Pham et al., CompeteSMoE, arXiv 2402.02526, and its code; the cap on competing layers of arXiv 2505.13380.

    Raises:
        BadInput: numbers that `Coins` refuses; from `make`, k outside 1..E.

    >>> Competition(k=2).make(6, 4, 5)(torch.randn(2, 7, 6)).shape
    torch.Size([2, 7, 6])
    """

    name = "competition"
    paper = Paper(
        "competesmoe",
        "CompeteSMoE - Effective Training of Sparse Mixture of Experts via Competition",
        "arXiv 2402.02526",
        (
            "of the two versions the first's affinity (the norm) and weights are here; the second's mean softplus and its diversity loss are left out",
            "the first version's code compares the target in the order of an unsorted top-k; ours is put where the winners are",
            "the rate of competition and the strength of distillation are defaults of ours, and steer as they do in the papers",
            "its language and vision models were not trained",
            "on our character model its loss is no lower than that of the same layer without competition",
        ),
    )
    balances = (LoadBalance(0.01),)
    parts = (FFN, Linear, TopK)
    k: int = 2
    rate: float = 0.1
    warmup: int = 0
    most: int | None = None
    seed: int = 0
    strength: float = 10.0

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(), cls(k=1), cls(k=4))

    def __post_init__(self) -> None:
        Coins(self.rate, self.warmup, self.most, self.seed)

    @property
    def controllers(self) -> tuple[Controller, ...]:
        return (Coins(self.rate, self.warmup, self.most, self.seed),)

    def make(self, width: int, experts: int, inner: int, /) -> nn.Module:
        need_k(self.k, experts)
        return Competing(Linear(width, experts), FFN(experts, width, inner), TopK(self.k), self.strength)
