"""Group-limited routing: experts from few groups, the groups by their likeliest expert, and transformers' own router as the oracle."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Routing, Scores
from rarefy.experts.routers.group_limited import GroupLimited
from rarefy.experts.routers.topk import TopK
from rarefy.experts.routing import dense
from tests.evidence import check

SLUG = "deepseek-v2-routing"


def logits(rows: int = 60, experts: int = 12) -> torch.Tensor:
    return 2 * torch.randn(rows, experts, generator=torch.Generator().manual_seed(0))


def groups_hold(choice: type[GroupLimited]) -> None:
    """Of all choices of 2 of 4 groups the one with the likeliest experts, best first, and in it the 4 likeliest experts, at their probability; all groups are plain top-k."""
    z = logits()
    p = z.softmax(1)
    found = dense(choice(4, groups=4, limit=2)(Scores(z), Context()))
    for row, got in zip(p, found, strict=True):
        tops = row.view(4, 3).max(1).values
        pair = max(combinations(range(4), 2), key=lambda gs: sum(float(tops[g]) for g in gs))
        inside = torch.cat([row.view(4, 3)[g] for g in pair]).topk(4).values
        assert int((got.view(4, 3) > 0).any(1).sum()) <= 2
        torch.testing.assert_close(got[got > 0].sort().values, inside.sort().values)
    free = choice(3, groups=4, limit=4)(Scores(z), Context())
    torch.testing.assert_close(dense(free), dense(TopK(3, renormalise=False)(Scores(z), Context())))


class Unlimited(GroupLimited):
    def __call__(self, scores: Scores, context: Context) -> Routing:
        return TopK(self.top, renormalise=False)(scores, context)


class ByMass(GroupLimited):
    """A group is as good as the sum of its experts."""

    def _reached(self, p: torch.Tensor) -> torch.Tensor:
        mass = p.unflatten(1, (self.groups, -1)).sum(-1, keepdim=True).expand(-1, -1, p.shape[1] // self.groups)
        return super()._reached(mass.flatten(1))


class Renormalised(GroupLimited):
    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = super().__call__(scores, context)
        return Routing(r.expert, r.weight / dense(r).sum(1)[r.rows()], r.items, r.experts, r.k, scores=scores)


GROUPS = "the likeliest experts of the groups with the likeliest experts, at their probability"


@check(SLUG, GROUPS, kind="method")
def test_groups() -> None:
    groups_hold(GroupLimited)


@check(SLUG, GROUPS, kind="twin")
@pytest.mark.parametrize("twin", [Unlimited, ByMass, Renormalised])
def test_groups_twins(twin: type[GroupLimited]) -> None:
    with pytest.raises(AssertionError):
        groups_hold(twin)


@check(SLUG, GROUPS, kind="oracle")
def test_against_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    sizes: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "n_routed_experts": 12, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
    router = DeepseekV2TopkRouter(transformers.DeepseekV2Config(**sizes, topk_method="group_limited_greedy", routed_scaling_factor=1.0, norm_topk_prob=False))
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        router.weight.copy_(torch.randn(12, 8, generator=torch.Generator().manual_seed(2)))
        z, weight, index = router(x)
    torch.testing.assert_close(dense(GroupLimited(4, groups=4, limit=2)(Scores(z), Context())), torch.zeros(50, 12).scatter(1, index, weight))


def test_what_is_refused() -> None:
    for choice, message in (
        (GroupLimited(1, groups=5), "5 groups of 12"),
        (GroupLimited(1, groups=4, limit=5), "5 of 4 groups"),
        (GroupLimited(7, groups=2, limit=1), "7 experts in 1 groups of 6"),
    ):
        with pytest.raises(BadInput, match=message):
            choice(Scores(logits(2)), Context())
