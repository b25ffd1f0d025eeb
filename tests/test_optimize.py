"""The search: exact undo, the budget kept, nothing repeated after a kill."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.errors import BadInput
from rarefy.core.search import Bisect, trial
from rarefy.weights.criteria.magnitude import MAGNITUDE
from rarefy.weights.criteria.wanda import WANDA
from rarefy.weights.optimize import optimize, relative_loss

X, Y = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 8


@cache
def fitted() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model


def net() -> nn.Sequential:
    return copy.deepcopy(fitted())


def evaluate(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return nn.functional.cross_entropy(model(X), Y, reduction="none")


def test_a_trial_is_undone_bit_for_bit_after_an_exception_too() -> None:
    model = net()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(KeyError), trial(model):
        for p in model.parameters():
            p.data.mul_(3)
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_bisection_finds_the_threshold_within_its_tolerance() -> None:
    found = Bisect(0.0, 1.0, 0.01)(lambda x: x >= 0.637)
    assert 0.637 <= found <= 0.647


def test_the_budget_holds_on_the_model_that_is_left() -> None:
    model = net()
    dense = evaluate(model)
    record, pruned = optimize(model, [X], [MAGNITUDE, WANDA], evaluate, max_loss=0.03, tolerance=0.05)
    assert pruned is not None and record["chosen"]["density"] < 1
    left = relative_loss(dense, evaluate(model))
    assert left.value == pytest.approx(record["loss"]) and left.value <= 0.03
    assert any(not t["ok"] for t in record["tried"])
    assert pruned["density"] == pytest.approx(record["chosen"]["density"], abs=1e-3)


def test_no_budget_keeps_the_dense_model_exactly() -> None:
    model = net()
    before = [p.clone() for p in model.parameters()]
    record, pruned = optimize(model, [X], [MAGNITUDE], lambda m: torch.full((8,), float(sum((p == 0).sum() for p in m.parameters()))), max_loss=0.0)
    assert record["chosen"] is None and pruned is None
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_killed_search_repeats_no_finished_try(tmp_path: Path) -> None:
    calls = []

    def counted(model: nn.Module, stop: int = 3) -> Tensor:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return evaluate(model)

    journal = tmp_path / "tries.json"
    with pytest.raises(KeyboardInterrupt):
        optimize(net(), [X], [WANDA], counted, max_loss=0.03, journal=journal)
    assert sum(len(r) > 0 for r in json.loads(journal.read_text()).values()) == 1
    again, _ = optimize(net(), [X], [WANDA], evaluate, max_loss=0.03, journal=journal)
    fresh, _ = optimize(net(), [X], [WANDA], evaluate, max_loss=0.03)
    assert [t["reused"] for t in again["tried"]].count(True) == 1
    assert again["chosen"] == fresh["chosen"] and again["loss"] == fresh["loss"]


def test_the_interval_of_a_model_against_itself_is_null_and_a_shift_is_found() -> None:
    nll = torch.rand(4096, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * 0.2
    null = relative_loss(nll, nll + noise - noise.mean(), block=64)
    assert null.interval[0] < 0 < null.interval[1]
    shifted = relative_loss(nll, nll + 0.05 + noise - noise.mean(), block=64)
    assert shifted.value == pytest.approx(0.0513, abs=1e-3) and shifted.interval[0] > 0.02


def test_refusals() -> None:
    with pytest.raises(BadInput, match="there must be a recipe"):
        optimize(net(), [X], [], evaluate, max_loss=0.1)
    with pytest.raises(BadInput, match="must be finite and of the same tokens"):
        relative_loss(torch.zeros(3), torch.zeros(4))


def test_a_short_text_has_an_interval_of_its_own_spread() -> None:
    rise = torch.cat([torch.full((300,), 0.2), torch.full((300,), -0.1)])
    found = relative_loss(torch.zeros(600), rise)
    assert found.interval[0] < found.value < found.interval[1]
    assert relative_loss(torch.zeros(1), torch.zeros(1)).interval == (0.0, 0.0)
