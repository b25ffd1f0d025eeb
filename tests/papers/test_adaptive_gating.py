"""Adaptive gating: its two limits, the average that it states, the cost that it has, a balance of lone choices, a permutation of similar samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rarefy.core.ambient import Ambient
from rarefy.core.records import Context, Entry, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.core.trace import Trace
from rarefy.experts.balance.first_choice import FirstChoiceBalance
from rarefy.experts.balance.lone_choice import LoneChoiceBalance
from rarefy.experts.banks.glu import GLU
from rarefy.experts.curriculum import complexity, similar_first
from rarefy.experts.moe import MoE
from rarefy.experts.routers.gap import Gap
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.switch import Switch
from rarefy.experts.routers.topk import TopK
from rarefy.experts.routing import per_row
from tests.evidence import check
from tests.papers.routed import Counting

SLUG = "adaptive-gating"


def gap_holds(choice: type[Choice]) -> None:
    """T = 0 is the top-1 layer, T = 1 the top-2 layer; the mean is 1 + the share of small gaps and the experts run just that."""
    torch.manual_seed(0)
    x, affinity, bank = torch.randn(300, 6), Linear(6, 5), Counting(5, 6, 5)
    with torch.no_grad():
        for threshold, limit in ((0.0, Switch()), (1.0, TopK(2, renormalise=False))):
            got, want = (MoE(affinity, c, bank)(x) for c in (choice(threshold), limit))
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
        top = affinity(x, Context(), bank).logits.softmax(-1).topk(2).values
        before = 0.0
        for threshold in (0.0, 0.05, 0.1, 0.2, 0.5, 1.0):
            bank.rows = 0
            moe = MoE(affinity, choice(threshold), bank)
            with Trace(moe) as trace:
                moe(x)
            mean = per_row(trace.entries[0].routing).float().mean().item()
            assert mean == pytest.approx(1 + (top[:, 0] - top[:, 1] <= threshold).float().mean().item())
            assert bank.rows == round(mean * 300) and mean >= before
            before = mean


class ByRatio(Gap):
    """Compares the second with a share of the first, not their difference."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = TopK(2, renormalise=False)(scores, context)
        pair = r.weight.view(-1, 2)
        keep = torch.stack([pair[:, 0] >= 0, pair[:, 1] >= (1 - self.threshold) * pair[:, 0]], 1).flatten()
        return Routing(r.expert.where(keep, r.experts), r.weight * keep, r.items, r.experts, 2, scores=scores)


class MaskedOut(Gap):
    """The second expert is computed and weighted by 0: nothing is saved."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        r, both = super().__call__(scores, context), TopK(2)(scores, context)
        return Routing(both.expert, r.weight, r.items, r.experts, 2, scores=scores)


@check(SLUG, "top-1 and top-2 at its ends, and between them the experts that it states, run", kind="method")
def test_gap() -> None:
    gap_holds(Gap)


@check(SLUG, "top-1 and top-2 at its ends, and between them the experts that it states, run", kind="twin")
@pytest.mark.parametrize("twin", [ByRatio, MaskedOut])
def test_gap_twin(twin: type[Gap]) -> None:
    with pytest.raises(AssertionError):
        gap_holds(twin)


def balance_holds(balance: Callable[[Entry], Tensor]) -> None:
    """f counts rows with one expert only, P is over all rows; rows of two experts change f not at all."""
    lone, pair = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [4.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 2.0], [2.0, 2.0, 0.0]])
    logits = torch.cat([lone, pair])
    routing = Gap(0.1)(Scores(logits), Context())
    assert per_row(routing).tolist() == [1, 1, 1, 2, 2]
    want = 3 * (torch.tensor([2 / 3, 1 / 3, 0.0]) * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(balance(Entry("layer", 0, None, routing, Context())), want)
    none = Entry("layer", 0, None, Gap(1.0)(Scores(logits), Context()), Context())
    assert balance(none).item() == 0.0


@check(SLUG, "the balance loss counts the rows of one expert", kind="method")
def test_balance() -> None:
    balance_holds(LoneChoiceBalance(1.0))


@check(SLUG, "the balance loss counts the rows of one expert", kind="twin")
def test_balance_twin_of_all_first_choices() -> None:
    with pytest.raises(AssertionError):
        balance_holds(FirstChoiceBalance(1.0))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 6)
        self.moe = torch.nn.ModuleList(MoE(Linear(6, 4), Gap(0.2), GLU(4, 6, 5)) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h: Tensor = self.embed(input_ids)
        for layer in self.moe:
            h = h + layer(h)
        return h


def curriculum_holds(order: Callable[[Tensor], Tensor]) -> None:
    """An epoch's order is a permutation, starts with the least, and goes from similar to dissimilar."""
    torch.manual_seed(0)
    model, ids = Model(), torch.randint(0, 16, (9, 7))
    mask = torch.arange(7) < torch.tensor([7, 3, 7, 5, 7, 2, 7, 7, 4])[:, None]
    Ambient.attach(model)
    with Trace(model) as trace, torch.no_grad():
        model(ids, attention_mask=mask.long())
    vectors = complexity(trace.entries, 9)
    alone = torch.stack([per_row(Gap(0.2)(trace.entries[0].routing.scores, Context())).view(9, 7)[d][mask[d]].sub(1).float().mean() for d in range(9)])
    torch.testing.assert_close(vectors[:, 0], alone)
    vectors = vectors + 0.01
    found = order(vectors)
    assert sorted(found.tolist()) == list(range(9)) and vectors[found[0]].sum() == vectors.sum(1).min()
    likeness = torch.nn.functional.cosine_similarity(vectors[found], vectors[found[:1]], dim=1)
    assert (likeness.diff() <= 1e-6).all(), "not from similar to dissimilar"


@check(SLUG, "the curriculum is a permutation from similar to dissimilar samples", kind="method")
def test_curriculum() -> None:
    curriculum_holds(similar_first)


@check(SLUG, "the curriculum is a permutation from similar to dissimilar samples", kind="twin")
def test_curriculum_twin_by_the_sum() -> None:
    with pytest.raises(AssertionError, match="not from similar"):
        curriculum_holds(lambda vectors: vectors.sum(1).argsort())
