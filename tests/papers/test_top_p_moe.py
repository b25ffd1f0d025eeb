"""Top-p: the mass exceeds p and would not without the last expert, weights as they are, an entropy loss that keeps experts few, harder rows get more."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from rarefy.core.records import Context, Entry, Routing, Scores
from rarefy.core.roles import Balance, Choice
from rarefy.core.trace import Trace
from rarefy.experts.balance.row_entropy import RowEntropy
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.routers.mass_before import MassBefore
from rarefy.experts.routers.top_p import TopP
from rarefy.experts.routing import dense, per_row
from rarefy.tasks.char_lm import CharLM
from tests.evidence import check
from tests.papers.routed import trained

SLUG = "top-p-moe"


def mass_holds(choice: type[Choice]) -> None:
    """Kept mass > p, at most p without the last; p = 0 gives one expert, p = 1 all; a tie at exactly p takes one more; w = P."""
    logits = 2 * torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    for bound in (0.1, 0.4, 0.7, 0.95):
        routing = choice(bound)(Scores(logits), Context())
        kept = dense(routing)
        chosen = kept > 0
        assert (kept.sum(-1) > bound - 1e-6).all(), "the crossing expert is missing"
        last = p.masked_fill(~chosen, 2.0).min(-1).values
        assert ((p * chosen).sum(-1) - last <= bound + 1e-6).all(), "one expert too many"
        assert (p.masked_fill(chosen, 0.0).max(-1).values <= last).all()
        torch.testing.assert_close(kept, p * chosen)
    assert per_row(choice(0.0)(Scores(logits), Context())).unique().tolist() == [1]
    assert per_row(choice(1.0)(Scores(9 * logits), Context())).unique().tolist() == [16]
    assert per_row(choice(0.5)(Scores(torch.zeros(3, 2)), Context())).tolist() == [2] * 3, "the mass must exceed p"


class Renormalised(TopP):
    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = super().__call__(scores, context)
        weight = r.weight / dense(r).sum(-1)[r.rows()]
        return Routing(r.expert, weight, r.items, r.experts, r.k, scores=scores)


class DropsTheCrossing(TopP):
    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = super().__call__(scores, context)
        keep = r.ranks() < (per_row(r) - 1).clamp(min=1)[r.rows()]
        return Routing(r.expert.where(keep, r.experts), r.weight * keep, r.items, r.experts, r.k, scores=scores)


@check(SLUG, "the smallest set whose mass exceeds p, by its own weights", kind="method")
def test_mass() -> None:
    mass_holds(TopP)


@check(SLUG, "the smallest set whose mass exceeds p, by its own weights", kind="twin")
@pytest.mark.parametrize(("twin", "why"), [(Renormalised, "not close"), (DropsTheCrossing, "crossing expert is missing"), (MassBefore, "must exceed p")])
def test_mass_twin(twin: type[Choice], why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        mass_holds(twin)


@dataclass(frozen=True)
class NoLoss(Balance):
    beta: float = 0.0

    def __call__(self, entry: Entry) -> torch.Tensor:
        return 0.0 * entry.routing.weight.sum()


def entropy_keeps_experts_few(loss: type[Balance]) -> None:
    """On text, with the loss rows end with fewer experts than without it, and than they began with."""
    for seed in range(2):
        means = []
        for balances in ((LoadBalance(0.01),), (LoadBalance(0.01), loss(0.1))):
            _, first, last = trained("top-p", balances, seed=seed)
            means.append([torch.stack([per_row(e.routing).float().mean() for e in part]).mean().item() for part in (first, last)])
        (_, without), (began, ended) = means
        assert 1.0 <= ended < without - 0.05 and ended < began, means


@check(SLUG, "the entropy loss keeps the experts per row few on text", kind="method")
def test_entropy() -> None:
    entropy_keeps_experts_few(RowEntropy)


@check(SLUG, "the entropy loss keeps the experts per row few on text", kind="twin")
def test_entropy_twin() -> None:
    with pytest.raises(AssertionError):
        entropy_keeps_experts_few(NoLoss)


def loss_is_the_entropy(loss: Callable[[Entry], torch.Tensor], factor: float) -> None:
    """The mean over real rows of ``-sum p ln p``: ln E where a row is unsure of everything, 0 where it is sure."""
    unsure, sure = torch.zeros(3, 4), 50 * torch.eye(4)[:3]
    drawn = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    want = torch.distributions.Categorical(logits=drawn).entropy().mean().item()
    for logits, valid, value in ((unsure, None, math.log(4)), (sure, None, 0.0), (torch.cat([drawn, unsure]), torch.arange(23) < 20, want)):
        routing = TopP()(Scores(logits), Context(valid=valid))
        assert loss(Entry("layer", 0, None, routing, Context(valid=valid))).item() == pytest.approx(factor * value, abs=1e-6 * factor)


def of_the_mean(entry: Entry) -> torch.Tensor:
    """The entropy of the mean distribution."""
    assert entry.routing.scores is not None
    return torch.distributions.Categorical(probs=entry.routing.scores.logits.softmax(-1).mean(0)).entropy()


def of_squares(entry: Entry) -> torch.Tensor:
    """1 - sum p^2, which falls with the entropy."""
    assert entry.routing.scores is not None
    return (1 - entry.routing.scores.logits.softmax(-1).square().sum(-1)).mean()


@check(SLUG, "the loss is the mean entropy of a row's probabilities", kind="method")
def test_entropy_loss() -> None:
    balance, entropy = TopP.balances
    assert balance == LoadBalance(0.01)
    loss_is_the_entropy(entropy, 1e-4)


@check(SLUG, "the loss is the mean entropy of a row's probabilities", kind="twin")
@pytest.mark.parametrize("twin", [of_the_mean, of_squares])
def test_entropy_loss_twin(twin: Callable[[Entry], torch.Tensor]) -> None:
    with pytest.raises(AssertionError):
        loss_is_the_entropy(twin, 1.0)


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = [t.unique(return_inverse=True)[1].float() if t.unique().numel() < 50 else t.argsort().argsort().float() for t in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def test_rows_with_a_less_sure_router_get_more_experts() -> None:
    model, _, _ = trained("top-p", TopP.balances)
    x, y = CharLM(rows=512).batch(7, 0)
    with Trace(model) as trace, torch.no_grad():
        loss = F.cross_entropy(model(x), y, reduction="none")
    routing = trace.entries[0].routing
    assert routing.scores is not None and loss.shape == (512,)
    entropy = torch.distributions.Categorical(logits=routing.scores.logits).entropy()
    assert spearman(per_row(routing).float(), entropy) > 0.3
