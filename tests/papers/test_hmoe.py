"""HMoE: experts of different widths; a penalty on active parameters that is the balance of loads where widths are equal, and moves rows to narrow ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Entry, Scores
from rarefy.core.roles import Balance
from rarefy.core.trace import Trace
from rarefy.experts.balance.parameter_penalty import ParameterPenalty
from rarefy.experts.balance.row_entropy import RowEntropy
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.banks.ragged import Ragged, arithmetic
from rarefy.experts.routers.by_size import BySize
from rarefy.experts.routers.topk import TopK
from rarefy.experts.routing import dense
from rarefy.tasks.char_lm import CharLM
from tests.evidence import check

SLUG = "hmoe"


def entry(logits: Tensor, widths: Sequence[int], k: int) -> Entry:
    layer = SimpleNamespace(bank=SimpleNamespace(widths=torch.tensor(widths)))
    return Entry("layer", 0, layer, TopK(k, renormalise=False)(Scores(logits), Context()), Context())


def penalty_is_by_size(penalty: Balance) -> None:
    """Equal widths: the balance of loads times k. At equal use, the gradient in a wide expert's scores is larger."""
    logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    for k in (1, 2, 3):
        torch.testing.assert_close(penalty(entry(logits, [5] * 4, k)), k * LoadBalance(0.1)(entry(logits, [5] * 4, k)))
    even = (4 * F.one_hot(torch.arange(40) % 4, 4).float()).requires_grad_()
    penalty(entry(even, [2, 4, 6, 8], 1)).backward()
    assert even.grad is not None
    per_expert = even.grad.sum(0)
    assert bool((per_expert[1:] > per_expert[:-1] + 1e-4).all()), per_expert
    by_hand = 0.1 * 4 * sum(0.25 * w / 5 * p for w, p in zip([2, 4, 6, 8], even.detach().softmax(1).mean(0).tolist(), strict=True))
    assert float(penalty(entry(even.detach(), [2, 4, 6, 8], 1))) == pytest.approx(by_hand, rel=1e-5)


@dataclass(frozen=True)
class CountsExperts(LoadBalance):
    """Counts experts, not parameters."""

    alpha: float = 0.1

    def __call__(self, entry: Entry) -> Tensor:
        return super().__call__(entry) * entry.routing.counts().sum() / entry.routing.items


PENALTY = "the penalty is the balance of loads times k at equal widths, and weighs on wide experts"


@check(SLUG, PENALTY, kind="method")
def test_penalty() -> None:
    penalty_is_by_size(ParameterPenalty(0.1))


# Its paper was read in a summary only: the twins are not marked, so that the row stays partial.
def test_penalty_twin() -> None:
    with pytest.raises(AssertionError):
        penalty_is_by_size(CountsExperts())


@cache
def trained(balances: tuple[Balance, ...], steps: int = 400, seed: int = 0) -> dict[str, Any]:
    """Step by step the mean width of the experts that serve (over the mean of all) and the narrower half's share of assignments; the loss on held-out text."""
    task = CharLM(width=32, experts=8, rows=64)
    model: Any = task.model(seed, router="by-size")
    optimizer, active, narrow = torch.optim.Adam(model.parameters(), lr=3e-3), [], []
    widths = model.moe.bank.widths.float()
    for step in range(steps):
        x, y = task.batch(seed, step)
        with Trace(model) as trace:
            loss = F.cross_entropy(model(x), y)
        (seen,) = trace.entries
        loss = loss + sum(balance(seen) for balance in balances)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        used = (dense(seen.routing) > 0).float()
        active.append(float((used * widths).sum() / used.sum() / widths.mean()))
        narrow.append(float(used[:, :4].sum() / used.sum()))
    return {"active": active, "narrow": narrow, "loss": task.evaluate(model)["loss"]}


def narrow_experts_are_used(penalty: Balance) -> None:
    """On text experts that serve are narrower than the mean and than without the penalty, at a loss within 2%, and narrow ones serve more and more.

    Seeds 0 and 1: 0.90 and 0.86 of the mean width; 1.43 and 1.41 without a penalty, where the widest experts take all; 1.02 and 0.99 where experts
    are counted and not parameters. The narrower half serves 60% of the time in the first 50 steps, 65% and 70% in the last.
    """
    with_it, without = trained((penalty, RowEntropy(3e-2))), trained((RowEntropy(3e-2),))
    last = slice(-50, None)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    found = {name: (mean(run["active"][last]), mean(run["narrow"][:50]), mean(run["narrow"][last]), run["loss"]) for name, run in (("with", with_it), ("without", without))}
    assert mean(with_it["active"][last]) < min(0.95, mean(without["active"][last])), found
    assert with_it["loss"] < 1.02 * without["loss"], found
    assert mean(with_it["narrow"][last]) > mean(with_it["narrow"][:50]) + 0.03, found


NARROW = "on text experts that serve are narrower, at a loss within 2%, and narrow ones are used more and more"


@check(SLUG, NARROW, kind="method")
def test_narrow() -> None:
    narrow_experts_are_used(ParameterPenalty(0.1))


def test_narrow_twin() -> None:
    with pytest.raises(AssertionError):
        narrow_experts_are_used(CountsExperts())


def test_widths_are_the_papers_and_parameters_those_of_equal_experts() -> None:
    assert arithmetic(8, 4096) == [2304 + 512 * e for e in range(8)]
    for experts in (1, 2, 3, 7):
        for inner in (4, 16, 33):
            assert sum(arithmetic(experts, inner)) == experts * inner
    with pytest.raises(BadInput, match="inner width"):
        Ragged([3, 0], 4)
    with pytest.raises(BadInput, match="mass"):
        BySize(1.5)
