"""A random router that never learns, and a number of experts per row that grows while training: afterwards any number serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Entry, Paper, Routing, Scores
from rarefy.core.roles import Affinity, Choice, Controller
from rarefy.experts.active import counts, experts_of, with_k
from rarefy.experts.routers.topk import TopK
from rarefy.experts.routing import per_row


class Frozen(Affinity):
    """Score experts by a matrix and a bias that are drawn once and never change: ``logits = x W' + b``, both from U(-1, 1) / sqrt(d).

    x [R, d] of any float type -> logits [R, E] in float32. W and b are buffers: a state dict has them, an optimizer and weight decay do not.
    Source: Chen et al., arXiv 2303.01610, section 3.1, and its code (a linear layer as torch makes it, without gradients from the first step).

    >>> list(Frozen(2, 3).parameters()), sorted(Frozen(2, 3).state_dict())
    ([], ['bias', 'weight'])
    """

    exceptions: ClassVar[Mapping[str, str]] = {"every_parameter_learns": "a router that never learns has no parameter"}
    weight: Tensor
    bias: Tensor

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.register_buffer("weight", torch.empty(experts, width).uniform_(-bound, bound))
        self.register_buffer("bias", torch.empty(experts).uniform_(-bound, bound))

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        with torch.autocast(x.device.type, enabled=False):
            return Scores(F.linear(x.float(), self.weight.float(), self.bias.float()))


@dataclass(frozen=True)
class GrowK(Controller):
    """Let the number of experts per row grow in even steps: ``k = round((last - first) * step / over) + first``, then stay at `last`.

    All layers whose choice has a field k change together, between steps: k is what the step numbered from 0 runs with, halves are rounded
    to even. `first` None is half of the layer's experts, `last` None all of them. Source: Chen et al., arXiv 2303.01610, and its code.

    Raises:
        BadInput: a number below 1, or `first` above `last`; at the start, a layer with fewer experts than asked.
    """

    name = "grow-k"
    first: int | None = None
    last: int | None = None
    over: int = 1000

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(over=3), cls(1, 4, 2))

    def __post_init__(self) -> None:
        low, high = self.first or 1, self.last or 10**9
        if not (0 not in (self.first, self.last) and 1 <= low <= high and self.over >= 1):
            raise BadInput(f"{self!r}", "experts per row grow from at least one, over at least one step", "pass for example first=8, last=16, over=1000")

    def k(self, step: int, experts: int) -> int:
        """Experts per row at a step.

        >>> [GrowK(over=100).k(step, 16) for step in (0, 25, 50, 100, 999)]
        [8, 10, 12, 16, 16]
        """
        first, last = self.first or max(1, experts // 2), self.last or experts
        return round((last - first) * min(step, self.over) / self.over) + first

    def start(self, layers: Mapping[str, Any]) -> dict[str, Any]:
        for path, layer in layers.items():
            if counts(layer) and max(self.k(0, experts_of(layer)), self.k(self.over, experts_of(layer))) > experts_of(layer):
                raise BadInput(f"{self!r} for {path or 'a layer'} of {experts_of(layer)} experts", "a row takes between one and all of the experts")
        self.resume({"step": 0}, layers)
        return {"step": 0}

    def resume(self, state: dict[str, Any], layers: Mapping[str, Any]) -> None:
        for layer in layers.values():
            if counts(layer):
                with_k(layer, self.k(state["step"], experts_of(layer)))

    def after_step(self, state: dict[str, Any], layers: Mapping[str, Any], entries: Sequence[Entry], optimizer: Optimizer) -> dict[str, Any]:
        state = {"step": state["step"] + 1}
        self.resume(state, layers)
        return state


@dataclass(frozen=True)
class GrowingTopK(Choice):
    """Choose the k largest logits of a random router, weights a softmax over these alone; in training k grows from `first` to `last`.

    Scores with logits [R, E] -> Routing of R*k assignments, as `TopK` makes it; k None is all experts. Nothing is dropped and no loss asks
    for balance. The experts are what learns: the router is `Frozen`, so a row that resembles others goes where they go from the first step to
    the last, and experts further down a row's order learn to add to those before them. Afterwards more experts are better, and
    `rarefy.experts.active.set_active` serves the same parameters with any k.
    Source: Chen et al., Sparse MoE as the New Dropout, arXiv 2303.01610 (16 experts, 8 to 16 over the whole training), and its code.

    Raises:
        BadInput: k outside 1..E, or numbers that do not grow.

    >>> r = GrowingTopK(2)(Scores(torch.tensor([[0.0, 0.0, -9.0]])), Context())
    >>> r.expert.tolist(), r.weight.tolist()
    ([0, 1], [0.5, 0.5])
    """

    name = "growing-k"
    paper = Paper(
        "smoe-dropout",
        "Sparse MoE as the New Dropout: Scaling Dense and Self-Slimmable Transformers",
        "arXiv 2303.01610",
        (
            "of the schedules in its code the linear increase is here, not the others",
            "experts of attention, weight averaging and the consistency loss of two passes are left out",
            "a dense block is not split: experts are drawn as experts",
            "its language models were not trained",
        ),
    )
    affinity = Frozen
    k: int | None = None
    first: int | None = None
    last: int | None = None
    over: int = 1000

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(), cls(2), cls(3, last=3))

    def __post_init__(self) -> None:
        GrowK(self.first, self.last, self.over)

    @property
    def controllers(self) -> tuple[Controller, ...]:
        return (GrowK(self.first, self.last, self.over),)

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return TopK(scores.logits.shape[1] if self.k is None else self.k)(scores, context)

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return {"at most k experts per row": bool((per_row(routing) <= (self.k or routing.experts)).all())}
