"""Expert choice: exact loads, the dense mixture at c = E, the limit per row, and which grouping lets the past see the future."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Routing, Scores
from rarefy.experts.banks.glu import GLU
from rarefy.experts.dispatch import dispatch
from rarefy.experts.moe import MoE
from rarefy.experts.routers.expert_choice import ExpertChoice
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.solvers.capped import capped
from rarefy.experts.routing import dense
from tests.evidence import check

Choose = Callable[[Scores, Context], Routing]


def logits(rows: int, experts: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, experts, generator=g) + 2 * torch.randn(experts, generator=g)  # some experts are liked by all


def loads_hold(choice: Callable[[float], Choose]) -> None:
    """Every expert has exactly C rows, no more assignments exist than that, weights are raw, and c = E is the dense mixture."""
    routing = choice(2.0)(Scores(logits(24, 4)), Context())
    assert routing.counts().tolist() == [12] * 4 and routing.expert.numel() == 4 * 12
    p = logits(24, 4).softmax(-1)
    assert torch.equal(routing.weight, p[routing.rows(), routing.expert])
    torch.manual_seed(0)
    bank, x = GLU(4, 6, 5), torch.randn(24, 6)
    mixture = sum((p[:, [e]] * f(x) for e, f in enumerate(bank.split())), torch.zeros_like(x))
    torch.testing.assert_close(dispatch(x, choice(4.0)(Scores(logits(24, 4)), Context()), bank), mixture)


def rows_choose(factor: float) -> Choose:
    def choose(scores: Scores, context: Context) -> Routing:
        weight, expert = scores.logits.softmax(-1).topk(int(factor), -1)
        return Routing(expert.flatten(), weight.flatten(), *scores.logits.shape, k=int(factor))

    return choose


def softmax_over_rows(factor: float) -> Choose:
    """A softmax over rows is another router."""
    return lambda scores, context: ExpertChoice(factor)(Scores(scores.logits.softmax(0).log()), context)


def dense_mask(factor: float) -> Choose:
    """The right choice as an [R, E] mask: the experts run no fewer assignments than all."""

    def choose(scores: Scores, context: Context) -> Routing:
        w = dense(ExpertChoice(factor)(scores, context))
        return Routing(torch.arange(w.shape[1]).repeat(w.shape[0]), w.flatten(), *w.shape, k=w.shape[1])

    return choose


LOADS = "every expert takes exactly C rows in E*C assignments, and c = E is the dense softmax mixture"


@check("expert-choice", LOADS, kind="method")
def test_loads() -> None:
    loads_hold(ExpertChoice)


@check("expert-choice", LOADS, kind="twin")
@pytest.mark.parametrize("twin", [rows_choose, softmax_over_rows, dense_mask])
def test_loads_twins(twin: Callable[[float], Choose]) -> None:
    with pytest.raises(AssertionError):
        loads_hold(twin)


def limit_holds(choice: Callable[..., Choose]) -> None:
    """The soft assignment obeys the limit; rounding leaves at most a tenth of the rows above it; a limit of E changes nothing."""
    scores, take = Scores(logits(64, 8)), torch.tensor([16])
    soft = capped(scores.logits.softmax(-1)[None], take, 2)[0].exp()
    assert soft.sum(1).max() <= 2 + 1e-3 and soft.max() <= 1 + 1e-3
    routing = choice(2.0, limit=2)(scores, Context())
    assert routing.counts().tolist() == [16] * 8
    assert ((dense(routing) > 0).sum(1) > 2).sum() <= 6
    free, plain = choice(2.0, limit=8)(scores, Context()), choice(2.0)(scores, Context())
    assert torch.equal(dense(free), dense(plain))


@check("expert-choice", "a limit on a row's experts is obeyed before rounding and idle at E", kind="method")
def test_limit() -> None:
    limit_holds(ExpertChoice)


@check("expert-choice", "a limit on a row's experts is obeyed before rounding and idle at E", kind="twin")
def test_limit_twin_that_ignores_it() -> None:
    with pytest.raises(AssertionError):
        limit_holds(lambda factor, limit=None: ExpertChoice(factor))


def leaks(group: str | None, choice: Callable[..., Choose] = ExpertChoice) -> bool:
    """Whether changing the last time step of both sequences changes an earlier row of the output."""
    torch.manual_seed(0)
    sequences, steps = 8, 6
    moe = MoE(Linear(6, 4), choice(1.0, group=group), GLU(4, 6, 5)).eval()
    context = Context(owner=torch.arange(sequences).repeat_interleave(steps), positions=torch.arange(steps).repeat(sequences))
    x = torch.randn(sequences, steps, 6)
    later = torch.cat([x[:, :-1], 3 * torch.randn(sequences, 1, 6)], 1)
    with torch.no_grad():
        return not torch.equal(moe(x, context)[:, :-1], moe(later, context)[:, :-1])


@check("expert-choice", "the future reaches the past in groups of a sequence and not in groups of a time step", kind="method")
def test_groups() -> None:
    assert not ExpertChoice().causal(training=False) and ExpertChoice(group="positions").causal(training=False)
    assert leaks("owner") and leaks(None)
    assert not leaks("positions")


@check("expert-choice", "the future reaches the past in groups of a sequence and not in groups of a time step", kind="twin")
def test_groups_twin_without_a_group_axis() -> None:
    assert leaks("positions", lambda factor, group: ExpertChoice(factor))


@check("expert-choice", "the limited choice is the linear program's optimum", kind="oracle")
def test_limit_against_a_linear_program() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    import numpy as np

    s = logits(24, 4, seed=3).softmax(-1)
    rows, columns = np.kron(np.eye(24), np.ones((1, 4))), np.kron(np.ones((1, 24)), np.eye(4))
    best = optimize.linprog(-s.double().numpy().ravel(), A_ub=rows, b_ub=np.full(24, 2), A_eq=columns, b_eq=np.full(4, 9), bounds=(0, 1))
    soft = capped(s[None], torch.tensor([9]), 2)[0].exp()
    torch.testing.assert_close(soft.sum(0), torch.full((4,), 9.0), atol=0.05, rtol=0)
    assert float((soft * s).sum()) == pytest.approx(-best.fun, rel=0.01)


def test_padding_takes_no_seat_and_ties_go_to_the_lower_row() -> None:
    z = logits(24, 4)
    alone = ExpertChoice(1.0)(Scores(z), Context())
    assert alone.counts().tolist() == [6] * 4
    for group, key in ((None, {}), ("owner", {"owner": torch.zeros(34, dtype=torch.long)})):
        padded = Context(valid=torch.arange(34) >= 10, **key)
        among = ExpertChoice(1.0, group=group)(Scores(torch.cat([torch.full((10, 4), 9.0), z])), padded)
        assert not dense(among)[:10].any()
        assert torch.equal(dense(among)[10:], dense(alone))
    assert sorted(ExpertChoice(1.0)(Scores(torch.zeros(8, 4)), Context()).rows().tolist()) == sorted([0, 1] * 4)


def test_groups_are_those_of_each_alone_however_uneven() -> None:
    z, owner = logits(17, 4), torch.tensor([5] * 3 + [2] * 9 + [7] * 5)
    for limit in (None, 2):
        together = dense(ExpertChoice(1.5, limit=limit, group="owner")(Scores(z), Context(owner=owner)))
        for one in (5, 2, 7):
            alone = dense(ExpertChoice(1.5, limit=limit)(Scores(z[owner == one]), Context()))
            assert torch.equal(together[owner == one], alone)


def test_dead_experts_empty_batches_and_what_is_refused() -> None:
    live = torch.tensor([True, False, True, True])
    routing = ExpertChoice(1.0)(Scores(logits(8, 4)), Context(live=live))
    assert routing.counts().tolist() == [2, 0, 2, 2]
    for group in (None, "owner"):
        empty = ExpertChoice(group=group)(Scores(torch.zeros(0, 4)), Context(owner=torch.zeros(0, dtype=torch.long)))
        assert empty.expert.numel() == 0
    assert ExpertChoice()(Scores(torch.zeros(3, 1)), Context()).counts().tolist() == [3]
    with pytest.raises(BadInput, match="factor 0"):
        ExpertChoice(0.0)
    with pytest.raises(BadInput, match="a limit of 1"):
        ExpertChoice(2.0, limit=1)
    with pytest.raises(BadInput, match="group 'labels'"):
        ExpertChoice(group="labels")
    with pytest.raises(BadInput, match="expert choice by owner"):
        ExpertChoice(group="owner")(Scores(torch.zeros(3, 2)), Context())


def test_the_router_learns() -> None:
    torch.manual_seed(0)
    moe, x = MoE(Linear(6, 4), ExpertChoice(2.0), GLU(4, 6, 5)), torch.randn(12, 6)
    moe(x).square().sum().backward()
    (learned,) = moe.affinity.parameters()
    assert learned.grad is not None and learned.grad.abs().sum() > 1e-3
    assert replace(ExpertChoice(2.0)) == ExpertChoice(2.0)
