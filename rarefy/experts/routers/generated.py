"""A router that is generated: a frozen random network makes its weights from a small learned vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Affinity, Choice, Controller
from rarefy.experts.routers.frozen import GrowingTopK


class Generated(Affinity):
    """Score experts by weights that a frozen network makes of a learned vector e: ``[W, b] = V relu(U e + u) + v, logits = x W' + b``.

    e [d] is drawn from N(0, 1) and is the only parameter; U [h, d], u [h], V [E (d + 1), h] and v [E (d + 1)] are buffers, drawn as torch
    draws a linear layer and saved with the model; expert i's row of W and its bias are the i-th d + 1 values. W is made anew in every
    forward, so that its gradient reaches e. Every layer has its own. x [R, d] of any float type -> logits [R, E] in float32.
    Source: Do et al., HyperRouter, arXiv 2312.07035, and its code (h = 256).

    >>> router = Generated(4, 3)
    >>> [p.numel() for p in router.parameters()], [tuple(t.shape) for t in router.made()]
    ([4], [(3, 4), (3,)])
    """

    hidden_weight: Tensor
    hidden_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor

    def __init__(self, width: int, experts: int, *, hidden: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(width))
        for name, fan_in, outputs in (("hidden", width, hidden), ("out", hidden, experts * (width + 1))):
            bound = fan_in**-0.5
            self.register_buffer(f"{name}_weight", torch.empty(outputs, fan_in).uniform_(-bound, bound))
            self.register_buffer(f"{name}_bias", torch.empty(outputs).uniform_(-bound, bound))

    def made(self) -> tuple[Tensor, Tensor]:
        """W [E, d] and b [E] of the present vector, in float32."""
        inner = F.linear(self.embedding.float(), self.hidden_weight.float(), self.hidden_bias.float()).relu()
        both = F.linear(inner, self.out_weight.float(), self.out_bias.float()).view(-1, self.embedding.numel() + 1)
        return both[:, :-1], both[:, -1]

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        with torch.autocast(x.device.type, enabled=False):
            return Scores(F.linear(x.float(), *self.made()))


@dataclass(frozen=True)
class GeneratedTopK(Choice):
    """Choose as `GrowingTopK` does, k growing while training, by a router that is `Generated`: between a frozen one and a learned one.

    Scores with logits [R, E] -> Routing of R*k assignments; k None is all experts. `hidden` is the width of the network that makes the router.
    Source: Do et al., HyperRouter, arXiv 2312.07035 (16 experts, k from 8 to 16; the gains it reports are largest where few serve).

    Raises:
        BadInput: k outside 1..E, or numbers that do not grow.

    >>> r = GeneratedTopK(2)(Scores(torch.tensor([[0.0, 0.0, -9.0]])), Context())
    >>> r.expert.tolist(), r.weight.tolist()
    ([0, 1], [0.5, 0.5])
    """

    name = "generated-top-k"
    paper = Paper(
        "hyperrouter",
        "HyperRouter: Towards Efficient Training and Inference of Sparse Mixture of Experts",
        "arXiv 2312.07035",
        (
            "outside training the router is generated in every forward too, at the cost of one product with the frozen network",
            "its language models were not trained",
            "on our character model it does better at few experts than a frozen linear router because its logits are larger: the same router with its vector held does as well",
        ),
    )
    k: int | None = None
    first: int | None = None
    last: int | None = None
    over: int = 1000
    hidden: int = 256

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(), cls(2), cls(3, last=3))

    def __post_init__(self) -> None:
        self._growing()

    def affinity(self, width: int, experts: int, /) -> Affinity:
        return Generated(width, experts, hidden=self.hidden)

    @property
    def controllers(self) -> tuple[Controller, ...]:
        return self._growing().controllers

    def _growing(self) -> GrowingTopK:
        return GrowingTopK(self.k, self.first, self.last, self.over)

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return self._growing()(scores, context)

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return self._growing().invariants(routing, scores, context)
