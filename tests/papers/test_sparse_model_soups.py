"""Sparse model soups: one mask for all copies, a mean that has it too, batch norms measured anew, and no barrier between copies.

Measured here: see `test_a_soup_of_copies`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.errors import BadInput, Refused
from rarefy.core.exact import keep_count, topk_mask
from rarefy.core.records import Phase
from rarefy.tasks.digits import Digits
from rarefy.weights.replicas import Collect, RecalibrateNorms, average, recalibrate
from rarefy.weights.soups import SOUPS, Soups
from rarefy.weights.sparsifier import Sparsifier
from rarefy.weights.train import train
from tests.evidence import check
from tests.papers.at_start import DIGITS, batches
from tests.test_cli import run

State = dict[str, Tensor]
DENSITY, NOISY = 0.05, Digits(rows=8)
ONE_MASK = "a soup has the density of its copies exactly, and copies with masks of their own are refused"
MEASURED_ANEW = "batch norms carry the statistics of the soup, not the mean of those of its copies"
NO_BARRIER = "digits at 5%: the soup is as good as its mean copy in 4 of 5 seeds, between copies there is no barrier, between models pruned apart there is one"


@dataclass(frozen=True)
class Kept:
    """An action that hands the model as it is to a test."""

    into: list[State]

    def __call__(self, sparsifier: Any) -> None:
        self.into.append({key: t.detach().clone() for key, t in sparsifier.model.state_dict().items()})


def listening(phases: Sequence[Phase], into: list[State]) -> tuple[Phase, ...]:
    """The phases, each copy handed over before it joins a mean."""
    return tuple(replace(p, enter=(Kept(into), *p.enter)) if any(isinstance(action, Collect) for action in p.enter) else p for p in phases)


def steps_of(model: nn.Module, phases: Sequence[Phase], steps: int, seed: int = 0, more: Sequence[Any] = (), task: Digits = DIGITS) -> Sparsifier:
    sp = Sparsifier(model, phases, total=steps, batches=more).attach(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4))
    for step in range(steps):
        model.zero_grad()
        sp.loss(task.loss(model, task.batch(seed, step))).backward()
        assert sp.optimizer is not None
        sp.optimizer.step()
    return sp


def density(state: Mapping[str, Tensor]) -> int:
    return sum(int((t != 0).sum()) for t in state.values() if t.dim() == 2)


Average = Callable[[Sequence[Mapping[str, Tensor]], Mapping[str, Tensor]], Mapping[str, Tensor]]


def mean_of_all(copies: Sequence[Mapping[str, Tensor]], masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The twin: averages whatever it is given."""
    return {key: torch.stack([copy[key] for copy in copies]).mean(0) for key in copies[0]}


def one_mask_holds(mean: Average) -> None:
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(20, 30, generator=g) for _ in range(3)]
    mask = topk_mask(weights[0].abs(), 60)
    together = [{"w": w * mask} for w in weights]
    soup = mean(together, {"w": mask})["w"]
    assert int((soup != 0).sum()) == 60 and torch.allclose(soup, sum(weights) / 3 * mask)
    apart = [{"w": w * topk_mask(w.abs(), 60)} for w in weights]
    with pytest.raises(Refused, match="share one mask"):
        mean(apart, {"w": mask})


@check("sparse-model-soups", ONE_MASK, kind="method")
def test_one_mask() -> None:
    one_mask_holds(average)


@check("sparse-model-soups", ONE_MASK, kind="twin")
def test_masks_of_their_own() -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        one_mask_holds(mean_of_all)


@pytest.mark.parametrize("how", [Soups(3, 2), Soups(1, 1), Soups(2, 3)], ids=str)
def test_counts_are_exact_at_every_round(how: Soups) -> None:
    pytest.importorskip("sklearn")
    copies: list[State] = []
    starts: list[State] = []
    phases = [replace(p, enter=(*p.enter, Kept(starts))) if p.name.startswith("copy") else p for p in how(DENSITY, 60)]
    sp = steps_of(DIGITS.model(0), listening(phases, copies), 60)
    wanted = [keep_count(8832, DENSITY ** (k / how.rounds)) for k in range(1, how.rounds + 1) for _ in range(how.copies)]
    assert [density(c) for c in copies] == wanted
    last = copies[-how.copies :]
    assert all(torch.equal(start[key], tensor) for start in starts[-how.copies :] for key, tensor in starts[-1].items()), "copies start from one pruned model"
    assert len({(c["0.weight"] != 0).flatten().numpy().tobytes() for c in last}) == 1
    soup = average(last, sp.support.masks)
    assert all(torch.equal(tensor, soup[key]) for key, tensor in sp.model.state_dict().items())
    assert density(soup) == wanted[-1] and "soup" not in sp.anchors


def normed(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 10))


def without_recalibration(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """The twin: running statistics are averaged like weights."""
    return tuple(replace(p, enter=tuple(a for a in p.enter if not isinstance(a, RecalibrateNorms))) for p in phases)


def measured_anew(change: Callable[[Sequence[Phase]], Sequence[Phase]]) -> None:
    model, seen = normed(0), batches(4)
    steps_of(model, change(Soups(2, 1)(0.3, 24)), 24, more=seen)
    hidden = [model[0](x) for x, _ in seen]
    assert torch.allclose(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0), atol=1e-5)
    assert torch.allclose(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0), rtol=1e-4)
    assert all(m.training for m in model.modules()) and model[1].momentum == 0.1


@check("sparse-model-soups", MEASURED_ANEW, kind="method")
def test_norms_are_measured_anew() -> None:
    pytest.importorskip("sklearn")
    measured_anew(tuple)


@check("sparse-model-soups", MEASURED_ANEW, kind="twin")
def test_norms_that_were_averaged() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(AssertionError):
        measured_anew(without_recalibration)


def test_norms_need_batches() -> None:
    with pytest.raises(BadInput, match="pass batches="):
        recalibrate(normed(0), [])
    recalibrate(DIGITS.model(0), [])  # without norms nothing is to be measured


@cache
def copies_of(seed: int) -> tuple[list[State], State]:
    """Three copies and their soup, one round at 5%, in small batches, so that copies differ."""
    copies: list[State] = []
    model = NOISY.model(seed)
    steps_of(model, listening(Soups(3, 1)(DENSITY, 480), copies), 480, seed, task=NOISY)
    return copies, model.state_dict()


def accuracy(state: Mapping[str, Tensor]) -> float:
    model = DIGITS.model(0)
    model.load_state_dict(state)
    return DIGITS.evaluate(model)["accuracy"]


def barrier(first: State, second: State) -> float:
    """How far the accuracy half way lies below the mean of both ends."""
    half = {key: (first[key] + second[key]) / 2 for key in first}
    return (accuracy(first) + accuracy(second)) / 2 - accuracy(half)


def same_batches(seed: int) -> tuple[list[State], State]:
    """The twin: every copy sees the same batches in the same order."""
    first = copies_of(seed)[0][0]
    return [first] * 3, first


def pruned_apart(seed: int) -> tuple[list[State], State]:
    """The twin: what is averaged was trained and pruned from different starts."""
    apart = [copies_of((seed + i) % 5)[0][0] for i in range(3)]
    return apart, {key: torch.stack([c[key] for c in apart]).mean(0) for key in apart[0]}


def no_barrier_holds(made: Callable[[int], tuple[list[State], State]]) -> None:
    better, barriers = 0, []
    for seed in range(5):
        copies, soup = made(seed)
        assert not torch.equal(copies[0]["0.weight"], copies[1]["0.weight"])
        better += accuracy(soup) >= sum(accuracy(c) for c in copies) / 3
        barriers += [barrier(first, second) for first, second in combinations(copies, 2)]
    assert better >= 4, better
    assert sum(barriers) / len(barriers) < 0.01, barriers


@check("sparse-model-soups", NO_BARRIER, kind="method")
def test_a_soup_of_copies() -> None:
    """Seen here, soup against mean copy: +0.3, +1.8, +1.2, +0.7, +0.4 points; barriers from -1.8 to 0.1, apart from 9 to 37 points."""
    pytest.importorskip("sklearn")
    no_barrier_holds(copies_of)
    apart = [barrier(*pruned_apart(seed)[0][:2]) for seed in range(5)]
    assert min(apart) > 0.05, apart


@check("sparse-model-soups", NO_BARRIER, kind="twin")
@pytest.mark.parametrize("twin", [same_batches, pruned_apart])
def test_a_soup_of_others(twin: Callable[[int], tuple[list[State], State]]) -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(AssertionError):
        no_barrier_holds(twin)


def test_a_stopped_run_serves_the_same_soup(tmp_path: Any) -> None:
    pytest.importorskip("sklearn")

    class Stop(Exception): ...

    def stop(step: int, steps: int) -> None:
        if step == 37:  # the second copy is in training
            raise Stop

    how: dict[str, Any] = {"density": 0.2, "steps": 48, "save_every": 5}
    record = train(DIGITS, SOUPS, checkpoint_dir=tmp_path / "a", **how)
    with pytest.raises(Stop):
        train(DIGITS, SOUPS, checkpoint_dir=tmp_path / "b", progress=stop, **how)
    assert train(DIGITS, SOUPS, checkpoint_dir=tmp_path / "b", **how) == record
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_user_reaches_it(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    code, out, err = run(capsys, "train", "digits", "--recipe", "sparse-model-soups", "--density", "0.1", "--steps", "40", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert sum(site["nnz"] for site in found["sites"]) == 883
    with pytest.raises(BadInput, match="ask for 18 steps or more"):
        SOUPS.phases(0.1, 17)
    with pytest.raises(BadInput, match="no copies"):
        average([], {})
