"""Top-any gating: every row takes the experts that it passes the threshold of, and experts come and go while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, finfo, nn
from torch.optim import Optimizer

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Entry, Paper, Routing, Scores
from rarefy.core.roles import Affinity, Choice, Controller
from rarefy.experts.balance.switch_balance import valid_rows
from rarefy.experts.routing import per_row, real_rows, row_major


class Thresholds(Affinity):
    """Score by angle against a learned threshold per expert: ``s_e = sigmoid(cos(x, W_e))``, logits ``s_e - sigmoid(G_e)``.

    x [R, d] of any float type -> float32 Scores: logits [R, E], above zero where the row passes, and `select` s itself. W [E, d] is
    orthogonal at first, G zero. `live` [E], a buffer, marks the experts that there are: `first` of them at first, all if None; the others
    score the least float. In training the scores carry two losses over the live experts, each times `weight`: diversity
    ``||W' W'^T - I||_F``, rows W' of length 1, and simplicity, the mean length of W's rows.
    Source: Guo et al., DynMoE, arXiv 2405.14297, and its code LINs-lab/DynMoE (temperature 1).

    Raises:
        BadInput: `first` outside 1..E.

    >>> scores = Thresholds(8, 4)(torch.randn(3, 8), Context(), None)
    >>> torch.allclose(scores.logits, scores.select - 0.5)
    True
    """

    live: Tensor

    def __init__(self, width: int, experts: int, *, first: int | None = None, weight: float = 0.01) -> None:
        super().__init__()
        first = experts if first is None else first
        if not 1 <= first <= experts:
            raise BadInput(f"{first} of {experts} experts at first", "between one and all of them are live")
        self.weight = weight
        self.centres, self.gates = nn.Parameter(nn.init.orthogonal_(torch.empty(experts, width))), nn.Parameter(torch.zeros(experts))
        self.register_buffer("live", torch.arange(experts) < first)

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        with torch.autocast(x.device.type, enabled=False):
            unit = F.normalize(self.centres.float(), dim=1)
            s = (F.normalize(x.float(), dim=1) @ unit.T).sigmoid()
            least = finfo(s.dtype).min
            logits = (s - self.gates.float().sigmoid()).masked_fill(~self.live, least)
            return Scores(logits, select=s.masked_fill(~self.live, least), losses=self._losses(unit) if context.training else {})

    def _losses(self, unit: Tensor) -> dict[str, Tensor]:
        live = self.live.to(unit)
        both = live[:, None] * live
        alike = torch.linalg.norm((unit @ unit.T - torch.eye(len(unit), device=unit.device)) * both)
        simple = (self.centres.float().norm(dim=1) * live).sum() / live.sum()
        return {"diversity": self.weight * alike, "simplicity": self.weight * simple}


@dataclass(frozen=True)
class ExpertTurnover(Controller):
    """In every cycle of `every` steps, record the first `record`; then drop the experts that served no row and add one for the rows that none served.

    Over the recorded steps each layer of `Thresholds` counts the rows of each expert and adds up the rows x that had none. At their
    end experts without a row are no longer live (one stays); and where some row had none, the first free expert becomes live with W the
    sum's direction, of length 1, and G = 0; what the optimizer keeps of its router and expert starts at zero, its expert's weights stay as they lie.
    Source: Guo et al., DynMoE, arXiv 2405.14297, and its code (300 of 900 steps).

    Raises:
        BadInput: no step recorded, or more than there are.
    """

    name = "expert-turnover"
    needs_rows = True
    record: int = 300
    every: int = 900

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(), cls(1, 1), cls(2, 3))

    def __post_init__(self) -> None:
        if not 1 <= self.record <= self.every:
            raise BadInput(f"{self.record} of {self.every} steps recorded", "at least one step of each cycle is recorded, and at most all")

    def start(self, layers: Mapping[str, Any]) -> dict[str, Any]:
        return {"step": 0, "served": {}, "missed": {}}

    def after_step(self, state: dict[str, Any], layers: Mapping[str, Any], entries: Sequence[Entry], optimizer: Optimizer) -> dict[str, Any]:
        step = state["step"] % self.every
        served, missed = dict(state["served"]), dict(state["missed"])
        if step < self.record:
            for entry in entries:
                count, rows = entry.routing.counts(), self._unserved(entry)
                served[entry.path] = (count + torch.tensor(served.get(entry.path, 0), device=count.device)).tolist()
                missed[entry.path] = (rows + torch.tensor(missed.get(entry.path, 0.0), device=rows.device)).tolist()
        if step == self.record - 1:
            for path in served:
                turn_over(layers[path], torch.tensor(served[path]), torch.tensor(missed[path]), optimizer)
            served, missed = {}, {}
        return {"step": state["step"] + 1, "served": served, "missed": missed}

    def _unserved(self, entry: Entry) -> Tensor:
        assert entry.x is not None
        alone = (per_row(entry.routing) == 0) & valid_rows(entry)
        return entry.x[alone].float().sum(0)


@torch.no_grad()
def turn_over(layer: Any, served: Tensor, missed: Tensor, optimizer: Optimizer) -> None:
    """Drop the layer's experts that served nobody, and add one for what was missed: served [E] rows, missed [d] the sum of rows without an expert."""
    router = layer.affinity
    busy = router.live & (served.to(router.live.device) > 0)
    if bool(busy.any()):
        router.live.copy_(busy)
    free, length = (~router.live).nonzero().flatten(), float(missed.norm())
    if not len(free) or length == 0:
        return
    new = int(free[0])
    router.centres[new], router.gates[new], router.live[new] = (missed / length).to(router.centres), 0.0, True
    of_the_expert = [p for p in layer.bank.parameters() if p.dim() and p.shape[0] == len(served)]
    for parameter in (router.centres, router.gates, *of_the_expert):
        for kept in optimizer.state.get(parameter, {}).values():
            if isinstance(kept, Tensor) and kept.shape == parameter.shape:
                kept[new] = 0.0


@dataclass(frozen=True)
class TopAny(Choice):
    """Serve each row by every expert whose threshold it passes, at equal weights: ``y = 1/k sum_{z_e > 0} E_e(x)``, k of them.

    Scores with logits z [R, E] -> Routing of R*E assignments, the others to nobody (which costs no expert). The weight is 1/k whatever the
    scores; backward, as if it were ``relu(z) / k`` with k a constant (straight through the sign). In training a row may have no expert; outside it
    such a row has the expert of the largest `select`. `ExpertTurnover` drops and adds experts, `first` being there at first. No capacity.
    Source: Guo et al., DynMoE, arXiv 2405.14297, and its code.

    >>> logits = torch.tensor([[0.1, -0.2, 0.3], [-0.1, -0.2, -0.3]])
    >>> [TopAny()(Scores(logits), Context(training=t)).expert.tolist() for t in (True, False)]
    [[0, 3, 2, 3, 3, 3], [0, 3, 2, 0, 3, 3]]
    """

    name = "top-any"
    paper = Paper(
        "dynmoe",
        "Dynamic Mixture of Experts: An Auto-Tuning Approach for Efficient Transformer Models",
        "arXiv 2405.14297",
        (
            "an expert that is gone scores the least float, where the authors' code gives it the score 0, which a low threshold could still let pass",
            "the simplicity loss is of the live experts, where the code takes all; the code's further balance and efficiency losses are left out, as in its paper",
            "counts are of one process",
            "equations were read in the authors' code; its vision and language models were not trained",
        ),
    )
    first: int | None = None
    record: int = 300
    every: int = 900

    @property
    def controllers(self) -> tuple[Controller, ...]:
        return (ExpertTurnover(self.record, self.every),)

    def affinity(self, width: int, experts: int, /) -> Affinity:
        return Thresholds(width, experts, first=self.first)

    def __call__(self, scores: Scores, context: Context) -> Routing:
        z, experts = scores.logits.float(), scores.logits.shape[1]
        active = z.detach() > 0
        if context.live is not None:
            active = active & context.live
        passed = z.relu()
        a = active + (passed - passed.detach())
        if not context.training:
            best = self._best(scores, context)
            active, a = active | (best & ~active.any(1, keepdim=True)), a + (best & ~active.any(1, keepdim=True))
        each = torch.arange(experts, device=z.device).expand_as(z)
        return row_major(scores, context, each.where(active, experts), a / active.sum(1, keepdim=True).clamp(min=1))

    def _best(self, scores: Scores, context: Context) -> Tensor:
        """[R, E], True at each row's best live expert."""
        seen = (scores.logits if scores.select is None else scores.select).detach().float()
        if context.live is not None:
            seen = seen.masked_fill(~context.live, finfo(seen.dtype).min)
        return torch.arange(seen.shape[1], device=seen.device) == seen.max(1, keepdim=True).indices

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        served = per_row(routing)
        real = real_rows(served, context.valid)
        some = context.live is None or bool(context.live.any())
        return {"outside training every row has an expert": context.training or not some or bool((served[real] > 0).all())}
