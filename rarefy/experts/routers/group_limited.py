"""Group-limited routing: a row's experts come from few groups, as on few devices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.experts.balance.grouped_load import GroupedLoad
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.routing import per_row, probabilities, ranked, row_major


@dataclass(frozen=True)
class GroupLimited(Choice):
    """Choose the `limit` groups with the likeliest experts, and in them the `top` likeliest experts, each at its probability.

    Scores with logits [R, E], group g being the experts gE/G .. (g+1)E/G - 1 of G `groups` -> Routing of R*top assignments, first choice
    first; a group is as good as its likeliest expert; ``w = p_i``, not renormalised; of equals the lower index. limit = groups is top-k.
    With groups on devices, a row is sent to at most `limit` of them.
    Source: DeepSeek-AI, DeepSeek-V2, arXiv 2405.04434, section 2.2.2 (device-limited routing), and transformers' `group_limited_greedy`.

    Raises:
        BadInput: groups that do not divide the experts, a limit outside 1..groups, more experts per row than the groups hold.

    >>> logits = torch.tensor([[0.4, 0.05, 0.3, 0.25]]).log()
    >>> GroupLimited(2, groups=2, limit=1)(Scores(logits), Context()).expert.tolist()
    [0, 1]
    """

    name = "group-limited"
    paper = Paper(
        "deepseek-v2-routing",
        "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model (device-limited routing)",
        "arXiv 2405.04434",
        ("its communication balance loss and token dropping are not built in, and its language models were not trained",),
    )
    balances = (LoadBalance(0.003), GroupedLoad(0.05, 2))
    top: int = 2
    groups: int = 2
    limit: int = 1

    def __call__(self, scores: Scores, context: Context) -> Routing:
        experts = scores.logits.shape[1]
        if self.groups < 1 or experts % self.groups or not 1 <= self.limit <= self.groups:
            raise BadInput(f"{self.limit} of {self.groups} groups of {experts} experts", "the groups are equally large, and a row has at least one", "choose divisors of E")
        if not 1 <= self.top <= self.limit * experts // self.groups:
            raise BadInput(f"{self.top} experts in {self.limit} groups of {experts // self.groups}", "a row takes at least one and at most those of its groups")
        p = probabilities(scores.logits.float(), context.live)
        expert = ranked(torch.where(self._reached(p.detach()), p, -1.0))[1][:, : self.top]
        return row_major(scores, context, expert, p.gather(1, expert))

    def _reached(self, p: Tensor) -> Tensor:
        """[R, E], True in the groups that a row may use."""
        best = ranked(p.unflatten(1, (self.groups, -1)).amax(-1))[1][:, : self.limit]
        reached = torch.zeros(p.shape[0], self.groups, dtype=torch.bool, device=p.device).scatter(1, best, True)
        return reached.repeat_interleave(p.shape[1] // self.groups, 1)

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        chosen = routing.expert.view(-1, self.top)
        group = torch.where(chosen < routing.experts, chosen // (routing.experts // self.groups), -1)
        used = torch.stack([(group == g).any(1) for g in range(self.groups)]).sum(0)
        return {f"a row has at most {self.top} experts": bool((per_row(routing) <= self.top).all()), f"in at most {self.limit} groups": bool((used <= self.limit).all())}
