"""BASE layers: exact balance in training, greedy outside it, the identity at first, a gradient through the weight alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Routing, Scores
from rarefy.core.trace import Trace
from rarefy.experts.banks.residual import ResidualStack
from rarefy.experts.dispatch import dispatch, fused, gather, loop
from rarefy.experts.moe import MoE
from rarefy.experts.routers.balanced_assignment import BalancedAssignment, centres
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.solvers.balanced import balanced
from tests.evidence import check

TRAINING, EVALUATION = Context(training=True), Context()


def affinity(rows: int, experts: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, experts, generator=g) + 2 * torch.randn(experts, generator=g)


def choice_holds(choice: type[BalancedAssignment]) -> None:
    """Counts are exactly T/E and the objective is brute force's; outside training argmax; the weight is a sigmoid with the only gradient."""
    assert choice()(Scores(affinity(24, 4)), TRAINING).counts().tolist() == [6] * 4
    for seed in range(5):
        a = affinity(8, 2, seed)
        got = a.gather(1, choice()(Scores(a), TRAINING).expert[:, None]).sum().item()
        best = max(sum(a[r, e].item() for r, e in enumerate(pi)) for pi in product((0, 1), repeat=8) if sum(pi) == 4)
        assert got == pytest.approx(best, abs=1e-5)
    a = affinity(24, 4).requires_grad_()
    assert torch.equal(choice()(Scores(a), EVALUATION).expert, a.argmax(1))
    routing = choice()(Scores(a), TRAINING)
    (grad,) = torch.autograd.grad(routing.weight.sum(), a)
    chosen = a[torch.arange(24), routing.expert]
    torch.testing.assert_close(routing.weight, chosen.sigmoid())
    want = torch.zeros_like(a).scatter(1, routing.expert[:, None], (chosen.sigmoid() * (1 - chosen.sigmoid())).detach()[:, None])
    torch.testing.assert_close(grad, want)


class SoftmaxGate(BalancedAssignment):
    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = super().__call__(scores, context)
        weight = scores.logits.softmax(-1).gather(1, r.expert[:, None]).squeeze(1)
        return Routing(r.expert, weight, r.items, r.experts, 1, scores=scores)


class BalancedOutsideTrainingToo(BalancedAssignment):
    def __call__(self, scores: Scores, context: Context) -> Routing:
        return super().__call__(scores, TRAINING)


class FirstComeFirstServed(BalancedAssignment):
    """Equal counts without solving anything: each row takes its best expert that has room."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        a, room = scores.logits.detach().clone(), torch.full((scores.logits.shape[1],), scores.logits.shape[0] // scores.logits.shape[1])
        expert = torch.zeros(len(a), dtype=torch.long)
        for r, row in enumerate(a):
            expert[r] = (row if context.training else a[r]).masked_fill((room == 0) & context.training, -9e9).argmax()
            room[expert[r]] -= 1
        return Routing(expert, scores.logits.gather(1, expert[:, None]).squeeze(1).sigmoid(), *a.shape, 1, scores=scores)


EXACT = "exactly T/E rows each at brute force's optimum in training, argmax outside it, the gradient through the sigmoid alone"


@check("base-layers", EXACT, kind="method")
def test_choice() -> None:
    choice_holds(BalancedAssignment)


@check("base-layers", EXACT, kind="twin")
@pytest.mark.parametrize("twin", [SoftmaxGate, BalancedOutsideTrainingToo, FirstComeFirstServed])
def test_choice_twins(twin: type[BalancedAssignment]) -> None:
    with pytest.raises(AssertionError):
        choice_holds(twin)


def layer_holds(bank: ResidualStack, residual: bool = True) -> None:
    """With the host's residual: the identity at first, afterwards alpha f(x) + (1 - alpha) x, by every back end."""
    torch.manual_seed(0)
    moe, x = MoE(BalancedAssignment.affinity(6, 4), BalancedAssignment(), bank), torch.randn(24, 6)
    assert torch.equal(x + moe(x) if residual else moe(x), x)
    with torch.no_grad():
        for p in bank.parameters():
            p.add_(torch.randn_like(p))
    with Trace(moe) as trace:
        y = x + moe(x) if residual else moe(x)
    routing = trace.entries[0].routing
    for r in range(24):
        e = int(routing.expert[r])
        h = x[r]
        for d in range(bank.up.shape[0]):
            seen = F.layer_norm(h, (6,)) * bank.norm[d, 0, e] + bank.norm[d, 1, e]
            h = h + bank.down[d, e] @ (bank.up[d, e] @ seen + bank.up_bias[d, e]).relu() + bank.down_bias[d, e]
        alpha = (x[r] @ moe.affinity.weight[e]).sigmoid()
        torch.testing.assert_close(y[r], alpha * h + (1 - alpha) * x[r], atol=1e-4, rtol=1e-4)


@check("base-layers", "the layer is the identity at first and interpolates between the row and a residual stack", kind="method")
def test_layer() -> None:
    layer_holds(BalancedAssignment.bank(4, 6, 5, depth=2))


@check("base-layers", "the layer is the identity at first and interpolates between the row and a residual stack", kind="twin")
def test_layer_twin_that_replaces_the_ffn() -> None:
    with pytest.raises(AssertionError):
        layer_holds(ResidualStack(4, 6, 5, depth=2), residual=False)


START = "the experts' centres start orthogonal, a tenth long, so that every weight is near a half"


def start_holds(affinity: Callable[[int, int], Linear]) -> None:
    torch.manual_seed(0)
    matrix = affinity(6, 4).weight.detach()
    torch.testing.assert_close(matrix @ matrix.T, 0.01 * torch.eye(4), atol=1e-6, rtol=0)


@check("base-layers", START, kind="method")
def test_start() -> None:
    start_holds(BalancedAssignment.affinity)


@check("base-layers", START, kind="twin")
@pytest.mark.parametrize("twin", [Linear, lambda width, experts: centres(width, experts, gain=1.0)], ids=["drawn", "of unit length"])
def test_start_twin(twin: Callable[[int, int], Linear]) -> None:
    with pytest.raises(AssertionError):
        start_holds(twin)


@check("base-layers", "the assignment is scipy's linear_sum_assignment over repeated columns", kind="oracle")
@pytest.mark.parametrize(("rows", "experts"), [(24, 4), (64, 8), (96, 12), (30, 7), (5, 4), (1, 3)])
def test_against_scipy(rows: int, experts: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    import numpy as np

    for seed in range(3):
        a = affinity(rows, experts, seed)
        limit = -(-rows // experts)
        repeated = np.zeros((limit * experts, limit * experts))  # rows of padding have zero affinity
        repeated[:rows] = np.repeat(a.double().numpy(), limit, 1)
        best = repeated[optimize.linear_sum_assignment(repeated, maximize=True)].sum()
        expert = balanced(a)
        assert a.double().gather(1, expert[:, None]).sum().item() == pytest.approx(best, abs=1e-8)
        assert expert.bincount(minlength=experts).max() <= limit


def test_causality_as_declared() -> None:
    """In training the last row's affinity moves earlier rows; outside it never."""
    a = affinity(24, 4)
    futures = [torch.cat([a[:-1], 9 * torch.eye(4)[[e]]]) for e in range(4)]
    assert not BalancedAssignment().causal(training=True) and BalancedAssignment().causal(training=False)
    for context, pasts in ((TRAINING, 2), (EVALUATION, 1)):
        found = {tuple(BalancedAssignment()(Scores(z), context).expert[:-1].tolist()) for z in futures}
        assert min(len(found), 2) == pasts


def test_chunks_are_each_balanced_and_drawn_anew() -> None:
    a, valid = affinity(48, 4), torch.arange(48) < 32
    torch.manual_seed(0)
    context = Context(training=True, valid=valid)
    drawn = [BalancedAssignment(chunk=16)(Scores(a), context).expert for _ in range(2)]
    assert not torch.equal(*drawn)
    for expert in drawn:
        assert expert[:32].bincount(minlength=4).tolist() == [8] * 4 and (expert[32:] == 4).all()
    with pytest.raises(BadInput, match="chunk 0"):
        BalancedAssignment(chunk=0)


@pytest.mark.parametrize("context", [TRAINING, EVALUATION])
def test_padding_dead_experts_ties_and_what_is_not_finite(context: Context) -> None:
    from dataclasses import replace

    a, valid, live = affinity(12, 4), torch.arange(12) < 9, torch.tensor([True, True, False, True])
    routing = BalancedAssignment()(Scores(a), replace(context, valid=valid, live=live))
    assert routing.counts()[2] == 0 and (routing.expert[9:] == 4).all() and not routing.weight[9:].any()
    if context.training:
        assert routing.counts().tolist() == [3, 3, 0, 3]
        assert BalancedAssignment()(Scores(torch.zeros(6, 3)), context).expert.tolist() == [0, 0, 1, 1, 2, 2]
        broken = a.masked_fill(torch.eye(12, 4).bool(), float("nan"))
        assert BalancedAssignment()(Scores(broken), context).counts().tolist() == [3] * 4
    nobody = BalancedAssignment()(Scores(a), replace(context, live=torch.zeros(4, dtype=torch.bool)))
    assert (nobody.expert == 4).all() and not nobody.weight.any()
    assert BalancedAssignment()(Scores(a[:0]), context).expert.numel() == 0
    assert BalancedAssignment()(Scores(a[:, :1]), context).counts().tolist() == [12]


def test_back_ends_agree() -> None:
    torch.manual_seed(0)
    bank, x = ResidualStack(4, 6, 5, depth=2), torch.randn(9, 6)
    with torch.no_grad():
        for p in bank.parameters():
            p.add_(torch.randn_like(p))
    routing = Routing(torch.randint(0, 5, (18,)), torch.rand(18), 9, 4, 2)
    for backend in (gather, fused):
        torch.testing.assert_close(dispatch(x, routing, bank, backend=backend), dispatch(x, routing, bank, backend=loop))


def comes_to_agree(choice: type[BalancedAssignment]) -> None:
    """Rows of four kinds, one expert learning each: the share of rows that get the same expert in training and outside it rises."""
    torch.manual_seed(0)
    kinds, targets = torch.randn(4, 6), torch.randn(4, 6)
    moe = MoE(centres(6, 4), choice(), ResidualStack(4, 6, 8))
    optimizer = torch.optim.Adam(moe.parameters(), 1e-2)

    def agreement() -> float:
        x = kinds.repeat_interleave(128, 0) + 0.3 * torch.randn(512, 6)
        scores = moe.affinity(x, TRAINING, None)
        return float((moe.choice(scores, TRAINING).expert == moe.choice(scores, EVALUATION).expert).float().mean())

    before = agreement()
    for _ in range(150):
        x = kinds.repeat_interleave(16, 0) + 0.3 * torch.randn(64, 6)
        optimizer.zero_grad()
        (x + moe(x) - targets.repeat_interleave(16, 0)).square().mean().backward()
        optimizer.step()
    assert agreement() > before + 0.1, (before, agreement())


class WithoutAGradient(BalancedAssignment):
    """The affinities of the assignment, which has no gradient, are used for the weight too."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return super().__call__(Scores(scores.logits.detach()), context)


AGREE = "training and evaluation come to send rows to the same expert"


@check("base-layers", AGREE, kind="method")
def test_agreement() -> None:
    comes_to_agree(BalancedAssignment)


@check("base-layers", AGREE, kind="twin")
def test_agreement_twin() -> None:
    with pytest.raises(AssertionError):
        comes_to_agree(WithoutAGradient)
