"""Expanded drop: rows may also ask for experts of their own device that have room, before capacity is enforced by score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Routing
from rarefy.core.roles import Overflow
from rarefy.experts.overflow.score_capacity import ScoreCapacity, best_first, rescaled, score, sums
from rarefy.experts.routing import probabilities, unpadded

_ADDS = "it adds experts, which is what it is for"


@dataclass(frozen=True)
class ExpandedDrop(Overflow):
    """Let every row ask for `extra` more experts of its device, those with least load first; then each expert keeps its C best by probability.

    ``C = ceil(factor * R k / E)`` of the R k assignments that came. Experts lie on `devices` in equal contiguous parts, and so do rows,
    unless `context.labels` [R] says on which device each is. An expert that a row has already is not counted twice; `extra` None is all of
    the device. An added expert weighs its probability, times what the row's weights are of theirs (1 where they are the softmax itself); with
    `renormalise` a row's weights sum to what they did. Every expert keeps at least as many rows as under `ScoreCapacity`, the idle ones more,
    and a row may have more than k experts. Not counted as dropped is an added expert that did not find room. A lone row is left as it is, as is
    the choice of a routing without scores, which is bounded alone. Which experts a row gets depends on the rest of its batch.
    Source: He et al., Capacity-Aware Inference, arXiv 2503.05066, and its code. There all experts count as local where nobody says which are.

    Raises:
        BadInput: a factor that is not positive, fewer than one device or extra expert; experts that the devices do not share evenly, a label
            that is no device.

    >>> from rarefy.core.records import Scores
    >>> logits = torch.tensor([[2.0, 1.0], [2.0, 0.0], [2.0, 1.5], [0.0, 3.0]])
    >>> routing = Routing(torch.tensor([0, 0, 0, 1]), torch.ones(4), 4, 2, k=1, scores=Scores(logits))
    >>> ExpandedDrop(1.0)(routing, Context()).expert.view(4, -1).tolist()  # row 2 lost expert 0 and has expert 1; 2 is nobody
    [[0, 2, 2], [0, 2, 2], [2, 1, 2], [1, 2, 2]]
    """

    name = "expanded-drop"
    paper = Paper(
        "capacity-aware",
        "Capacity-Aware Inference: Mitigating the Straggler Effect in Mixture of Experts",
        "arXiv 2503.05066",
        (
            "devices are simulated in one process: rows and experts are dealt to them, and nothing is sent",
            "an added expert's weight follows the scale of the row's own weights, where the code takes the softmax and renormalises in models that do",
            "speed was not measured: the bound on the busiest expert is what is tested",
            "the equations were read in the code and in summaries, not in the paper; its models were not run",
        ),
    )
    exceptions: ClassVar[Mapping[str, str]] = {"nothing_is_lost_silently": _ADDS, "where_there_is_room_nothing_changes": _ADDS}
    factor: float = 1.5
    devices: int = 1
    extra: int | None = None
    renormalise: bool = False

    def __post_init__(self) -> None:
        ScoreCapacity(self.factor)
        if self.devices < 1 or (self.extra is not None and self.extra < 1):
            raise BadInput(f"{self!r}", "there is at least one device, and at least one extra expert", "pass for example devices=2, extra=1")

    def bound(self, routing: Routing, context: Context) -> int:
        return ScoreCapacity(self.factor).bound(routing, context)

    def __call__(self, routing: Routing, context: Context) -> Routing:
        if routing.items <= 1 or routing.scores is None:
            return ScoreCapacity(self.factor, self.renormalise)(routing, context)
        before = unpadded(routing, context.valid)
        asked = self._asked(before, context)
        found = best_first(asked, score(asked, context), self.bound(routing, context))
        lost = before.counts() - found.count(torch.arange(found.expert.numel(), device=found.expert.device) % (found.k or 1) < (before.k or 0))
        found = replace(found, dropped=lost if before.dropped is None else before.dropped + lost)
        return rescaled(found, sums(before)) if self.renormalise else found

    def _asked(self, routing: Routing, context: Context) -> Routing:
        """The routing with the experts that are added to each row [R, k + m], row-major."""
        assert routing.scores is not None
        if routing.k is None or routing.item is not None:
            raise BadInput("a routing that is not row-major", "experts are added to rows of k each", "use the overflow score-capacity")
        p = probabilities(routing.scores.logits.float(), context.live)
        own, weight = routing.expert.view(-1, routing.k), routing.weight.view(-1, routing.k)
        local = self._least_loaded(routing, self._device(routing, context))
        taken = (local[:, :, None] == own[:, None, :]).any(2) | (p.gather(1, local) == 0)
        if context.valid is not None:
            taken = taken | ~context.valid.reshape(-1, 1)
        has = torch.cat([p, p.new_zeros(len(p), 1)], 1).gather(1, own).sum(1, keepdim=True)
        scale = weight.sum(1, keepdim=True) / has.where(has > 0, torch.ones_like(has))
        more = (p.gather(1, local) * scale).masked_fill(taken, 0.0).to(weight.dtype)
        expert = torch.cat([own, local.masked_fill(taken, routing.experts)], 1)
        return replace(routing, expert=expert.flatten(), weight=torch.cat([weight, more], 1).flatten(), k=expert.shape[1], rank=None)

    def _device(self, routing: Routing, context: Context) -> Tensor:
        """The device of every row, [R]."""
        if routing.experts % self.devices:
            raise BadInput(f"{routing.experts} experts on {self.devices} devices", "devices hold equally many experts")
        if context.labels is None:
            return torch.arange(routing.items, device=routing.expert.device) * self.devices // routing.items
        device = context.labels.reshape(-1).long()
        if bool(((device < 0) | (device >= self.devices)).any()):
            raise BadInput(f"labels up to {int(device.max())}", f"a label is one of {self.devices} devices")
        return device

    def _least_loaded(self, routing: Routing, device: Tensor) -> Tensor:
        """For every row the `extra` experts of its device with the smallest load, [R, m]."""
        each = routing.experts // self.devices
        load = routing.counts().view(self.devices, each)
        local = load.argsort(dim=1, stable=True)[:, : self.extra] + each * torch.arange(self.devices, device=load.device)[:, None]
        return local[device]
