"""Sparsely-gated MoE: P is the chance that it claims to be, the losses teach both matrices, an even start, evaluation without noise, balance on text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rarefy.core.records import Context, Entry, Routing, Scores
from rarefy.core.roles import Balance
from rarefy.core.trace import Trace
from rarefy.experts.balance.importance import Importance, cv_squared
from rarefy.experts.balance.smooth_load import SmoothLoad, chances
from rarefy.experts.banks.glu import GLU
from rarefy.experts.moe import MoE
from rarefy.experts.routers.noisy_topk import NoisyLinear, NoisyTopK
from rarefy.experts.routing import dense
from tests.evidence import check
from tests.papers.routed import load, trained

SLUG = "sparsely-gated-moe"
Chances = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def layer(width: int = 6, experts: int = 4, k: int = 2, affinity: type[NoisyLinear] = NoisyLinear) -> MoE:
    return MoE(affinity(width, experts), NoisyTopK(k), GLU(experts, width, 5))


def entry(moe: MoE, x: Tensor) -> Entry:
    with Trace(moe) as trace:
        moe(x)
    return trace.entries[0]


# ---------------------------------------------------------------- the smooth load


def chance_holds(chance: Chances) -> None:
    """P(x, i) is how often expert i is among the k largest when its noise alone is drawn anew, within 1%, chosen or not."""
    g = torch.Generator().manual_seed(0)
    logits, std = torch.randn(3, 5, generator=g), 0.3 + torch.rand(3, 5, generator=g)
    noisy = logits + std * torch.randn(3, 5, generator=g)
    for k in (1, 2, 4):
        p = chance(logits, noisy, std, k)
        for i in range(5):
            drawn = logits[:, i : i + 1] + std[:, i : i + 1] * torch.randn(3, 40_000, generator=g)
            others = torch.cat([noisy[:, :i], noisy[:, i + 1 :]], 1)
            beaten = (drawn[:, :, None] < others[:, None, :]).sum(-1)
            torch.testing.assert_close(p[:, i], (beaten < k).float().mean(1), atol=0.01, rtol=0)
    assert torch.equal(chance(logits, noisy, std, 5), torch.ones(3, 5))


def threshold_with_itself(logits: Tensor, noisy: Tensor, std: Tensor, k: int) -> Tensor:
    return torch.special.ndtr((logits - noisy.topk(k).values[:, -1:]) / std)


@check(SLUG, "the smooth load is the chance to be chosen under one's own noise", kind="method")
def test_chance() -> None:
    chance_holds(chances)


@check(SLUG, "the smooth load is the chance to be chosen under one's own noise", kind="twin")
def test_chance_twin() -> None:
    with pytest.raises(AssertionError, match="not close"):
        chance_holds(threshold_with_itself)


def losses_teach(balances: Sequence[Balance], affinity: type[NoisyLinear] = NoisyLinear) -> None:
    """Both matrices get a gradient from the load loss, of a load that is not even; the noise is learned, not given."""
    torch.manual_seed(0)
    moe = layer(affinity=affinity)
    torch.nn.init.normal_(moe.affinity.weight)
    seen = entry(moe, torch.randn(32, 6))
    torch.stack([balance(seen) for balance in balances]).sum().backward()
    for name, parameter in moe.affinity.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 1e-4, f"no gradient for {name}"


class Counts(SmoothLoad):
    """The load by counting: no gradient."""

    def __call__(self, entry: Entry) -> Tensor:
        assert entry.routing.scores is not None
        return self.weight * cv_squared(entry.routing.counts().float()) + 0.0 * entry.routing.scores.logits.sum()


class ConstantNoise(NoisyLinear):
    def forward(self, x: Tensor, context: Context, bank: object) -> Scores:
        logits = x @ self.weight.T
        std = torch.ones_like(logits) + 0.0 * self.noise.sum()
        return Scores(logits, select=logits + std * torch.randn_like(logits), noise=std)


@check(SLUG, "the load loss has a gradient, to the noise's matrix too", kind="method")
def test_losses_teach() -> None:
    losses_teach([SmoothLoad()])


@check(SLUG, "the load loss has a gradient, to the noise's matrix too", kind="twin")
@pytest.mark.parametrize(("balance", "affinity"), [(Counts(), NoisyLinear), (SmoothLoad(), ConstantNoise)])
def test_losses_teach_twin(balance: SmoothLoad, affinity: type[NoisyLinear]) -> None:
    with pytest.raises(AssertionError, match="no gradient for"):
        losses_teach([balance], affinity)


# ---------------------------------------------------------------- start and evaluation


def noise_holds(affinity: type[NoisyLinear]) -> None:
    """At the start every expert is as likely, within sampling error; the noise is normal, of the learned deviation; outside training there is none and the load is counted."""
    torch.manual_seed(0)
    moe, x = layer(affinity=affinity), torch.randn(4000, 6)
    drawn = affinity(6, 4)
    torch.nn.init.normal_(drawn.noise)
    scores = drawn(x, Context(training=True), None)
    assert scores.select is not None and scores.noise is not None
    torch.testing.assert_close(scores.noise, (1 + (x @ drawn.noise.T).exp()).log() + 0.01)
    noise = ((scores.select - scores.logits) / scores.noise).detach()
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03 and abs(noise.abs().lt(1).float().mean() - 0.683) < 0.02
    counts = entry(moe, x).routing.counts()
    assert counts.sum() == 8000 and (counts - 2000).abs().max() < 4 * (4000 * 0.25) ** 0.5
    torch.nn.init.normal_(moe.affinity.weight)
    moe.eval()
    with torch.no_grad():
        assert torch.equal(moe(x), moe(x)), "noise in evaluation"
    seen = entry(moe, x[:50])
    assert SmoothLoad(1.0)(seen).item() == pytest.approx(cv_squared(seen.routing.counts().float()).item())
    top = (x[:50] @ moe.affinity.weight.T).topk(2)
    assert torch.equal(seen.routing.expert.view(-1, 2), top.indices)
    torch.testing.assert_close(seen.routing.weight.view(-1, 2), top.values.softmax(-1))


class NoisyInEvaluation(NoisyLinear):
    def forward(self, x: Tensor, context: Context, bank: object) -> Scores:
        return super().forward(x, Context(training=True), bank)


class UniformNoise(NoisyLinear):
    """Noise in [0, 1) times the deviation."""

    def forward(self, x: Tensor, context: Context, bank: object) -> Scores:
        scores = super().forward(x, context, bank)
        return scores if scores.noise is None else replace(scores, select=scores.logits + torch.rand_like(scores.logits) * scores.noise)


@check(SLUG, "an even start, and no noise in evaluation", kind="method")
def test_noise() -> None:
    noise_holds(NoisyLinear)


@check(SLUG, "an even start, and no noise in evaluation", kind="twin")
@pytest.mark.parametrize(("twin", "why"), [(NoisyInEvaluation, "noise in evaluation"), (UniformNoise, "0.03")])
def test_noise_twin(twin: type[NoisyLinear], why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        noise_holds(twin)


# ---------------------------------------------------------------- on text


def balances_text(balances: Sequence[Balance]) -> None:
    """On text the load's CV^2 stays below a tenth, and far below what it grows to without the losses."""
    for seed in range(2):
        _, first, last = trained("noisy-topk", (), seed=seed)
        loose = cv_squared(load(last)).item()
        assert loose > 3 * cv_squared(load(first)).item()
        _, _, last = trained("noisy-topk", balances, seed=seed)
        assert cv_squared(load(last)).item() < min(0.1, loose / 5)


@check(SLUG, "the losses keep a character model's load even, which drifts without them", kind="method")
def test_text() -> None:
    balances_text(NoisyTopK.balances)


@check(SLUG, "the losses keep a character model's load even, which drifts without them", kind="twin")
def test_text_twin_with_a_counted_load() -> None:
    with pytest.raises(AssertionError):
        balances_text((Counts(0.1),))


def importance_holds(balance: Balance) -> None:
    """0 where all experts are given as much, 1 where half of them share it, E - 1 where one has it all, however many rows there are; it sees weights, not counts."""
    for rows in (4, 40):
        for chosen, want in (([0, 1, 2, 3], 0.0), ([0, 1, 0, 1], 1.0), ([2, 2, 2, 2], 3.0)):
            routing = Routing(torch.tensor(chosen).repeat(rows // 2), torch.full((2 * rows,), 0.5), rows, 4, 2)
            assert balance(Entry("", 0, None, routing, Context())).item() == pytest.approx(want)
    weighed = Routing(torch.tensor([0, 1]), torch.tensor([0.75, 0.25]), 1, 2, 2)
    assert balance(Entry("", 0, None, weighed, Context())).item() == pytest.approx(0.25)


class Variance(Importance):
    """Not over the squared mean: it grows with the rows."""

    def __call__(self, entry: Entry) -> Tensor:
        return dense(entry.routing).sum(0).var(correction=0)


class OfCounts(Importance):
    """Rows are counted, however little an expert's weight is."""

    def __call__(self, entry: Entry) -> Tensor:
        return cv_squared(entry.routing.counts().float())


IMPORTANCE = "importance is the squared variation of the weights that experts are given"


@check(SLUG, IMPORTANCE, kind="method")
def test_importance() -> None:
    importance_holds(Importance(1.0))


@check(SLUG, IMPORTANCE, kind="twin")
@pytest.mark.parametrize("twin", [Variance(1.0), OfCounts(1.0)])
def test_importance_twin(twin: Balance) -> None:
    with pytest.raises(AssertionError):
        importance_holds(twin)


def test_one_expert_per_row_learns_from_its_losses_alone() -> None:
    moe = layer(k=1)
    seen = entry(moe, torch.randn(16, 6))
    assert torch.equal(seen.routing.weight, torch.ones(16))
    SmoothLoad()(seen).backward()
    assert moe.affinity.noise.grad is not None
