"""SWAMP: one particle is iterative magnitude pruning, the mask is the average's, and the average is worth more than its particles.

Measured here: see `test_the_average_is_worth_more`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.exact import keep_count
from rarefy.core.records import Phase
from rarefy.tasks.digits import Digits
from rarefy.weights.actions import Rewind
from rarefy.weights.replicas import Collect, Forget
from rarefy.weights.rewind import IMP, rounds
from rarefy.weights.sparsifier import Sparsifier
from rarefy.weights.swamp import SWAMP, Swamp
from rarefy.weights.train import train
from tests.evidence import check
from tests.papers.at_start import DIGITS
from tests.test_cli import run

State = dict[str, Tensor]
Change = Callable[[Sequence[Phase]], Sequence[Phase]]
IS_IMP = "one particle whose iterates are not averaged ends in the weights of iterative magnitude pruning, bit for bit"
ONE_TICKET = "particles start from one ticket, what is pruned is the mean of all their iterates, by counts of .8^c exactly"
WORTH = "digits at .8^11: the average is above its best iterate in 3 of 3 seeds, with no barrier between particles"


@dataclass(frozen=True)
class Kept:
    """An action that hands the model and its masks to a test."""

    into: list[tuple[State, State]]

    def __call__(self, sparsifier: Any) -> None:
        state = {key: t.detach().clone() for key, t in sparsifier.model.state_dict().items()}
        self.into.append((state, {key: mask.clone() for key, mask in sparsifier.support.masks.items()}))


def trained(phases: Sequence[Phase], steps: int, seed: int = 0, task: Digits = DIGITS) -> State:
    model = task.model(seed)
    sp = Sparsifier(model, phases, total=steps).attach(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4))
    for step in range(steps):
        model.zero_grad()
        sp.loss(task.loss(model, task.batch(seed, step))).backward()
        assert sp.optimizer is not None
        sp.optimizer.step()
    return {key: t.detach().clone() for key, t in model.state_dict().items()}


def unchanged(phases: Sequence[Phase]) -> Sequence[Phase]:
    return phases


def is_imp(change: Change) -> None:
    steps = sum(p.until for p in IMP.phases(0.4, 60))
    expected, found = trained(IMP.phases(0.4, steps), steps), trained(change(Swamp(1, averaged=0)(0.4, steps)), steps)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def goes_on(phases: Sequence[Phase]) -> Sequence[Phase]:
    """The twin: the average is pruned and trained on, as a soup is; nothing goes back to the early weights."""
    return [replace(p, enter=tuple(a for a in p.enter if a != Rewind())) for p in phases]


@check("swamp", IS_IMP, kind="method")
def test_one_particle() -> None:
    pytest.importorskip("sklearn")
    is_imp(unchanged)


@check("swamp", IS_IMP, kind="twin")
def test_one_particle_that_goes_on() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(AssertionError):
        is_imp(goes_on)


def one_ticket_holds(change: Change) -> None:
    """Three particles, two iterates each, two rounds, followed by hand."""
    ends: list[tuple[State, State]] = []
    starts: list[tuple[State, State]] = []
    phases = change(Swamp(3, iterates=2)(0.64, 120))
    heard = [replace(p, enter=(*((Kept(ends),) if Collect("mean") in p.enter else ()), *p.enter, *((Kept(starts),) if p.name.startswith("particle") else ()))) for p in phases]
    last = trained(heard, 120)
    early = starts[0][0]
    for cycle in range(3):
        iterates = [state for state, _ in ends[6 * cycle : 6 * cycle + 6]]
        masks = ends[6 * cycle][1]
        assert sum(int(m.sum()) for m in masks.values()) == keep_count(8832, 0.8**cycle)
        assert all(torch.equal(m, masks[key]) for _, other in ends[6 * cycle : 6 * cycle + 6] for key, m in other.items())
        mean = {key: torch.stack([state[key] for state in iterates]).mean(0) for key in early}
        if cycle == 2:
            assert all(torch.allclose(last[key], mean[key], atol=1e-6) for key in mean)
            return
        cut = torch.cat([mean[key].abs().flatten() for key in masks]).sort(descending=True).values[keep_count(8832, 0.8 ** (cycle + 1)) - 1]
        kept = ends[6 * cycle + 6][1]
        assert sum(int((kept[key] != (mean[key].abs() >= cut)).sum()) for key in kept) <= 2  # means by other roundings may tie
        for state, _ in starts[6 * cycle + 6 : 6 * cycle + 12 : 2]:
            assert all(torch.equal(state[key], early[key]) for key in early), "a particle does not start from the ticket"


def prunes_a_particle(phases: Sequence[Phase]) -> Sequence[Phase]:
    """The twin: the last particle is pruned, not the average."""
    return [replace(p, enter=(Forget("mean"),)) if p.name == "prune" else p for p in phases]


@check("swamp", ONE_TICKET, kind="method")
def test_one_ticket() -> None:
    pytest.importorskip("sklearn")
    one_ticket_holds(unchanged)


@check("swamp", ONE_TICKET, kind="twin")
@pytest.mark.parametrize("twin", [prunes_a_particle, goes_on])
def test_other_tickets(twin: Change) -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(AssertionError):
        one_ticket_holds(twin)


NOISY, DENSITY, STEPS = Digits(rows=8), 0.8**11, 1800


def accuracy(state: Mapping[str, Tensor]) -> float:
    model = DIGITS.model(0)
    model.load_state_dict(state)
    return DIGITS.evaluate(model)["accuracy"]


@dataclass(frozen=True)
class StartsAnew:
    """For a twin: every particle starts from weights of its own."""

    def __call__(self, sparsifier: Any) -> None:
        Rewind()(sparsifier)
        sparsifier.model.load_state_dict(NOISY.model(sparsifier.progress.step).state_dict())


def rewinds_of_their_own(phases: Sequence[Phase]) -> Sequence[Phase]:
    """The twin: only the first particle of a round goes back to the ticket."""
    return [replace(p, enter=tuple(StartsAnew() if a == Rewind() and p.enter[0] == Collect("mean") else a for a in p.enter)) for p in phases]


@cache
def last_cycle(change: Change, seed: int) -> tuple[list[State], State]:
    """The last iterates of two particles, and their average."""
    ends: list[tuple[State, State]] = []
    phases = [replace(p, enter=(Kept(ends), *p.enter)) if Collect("mean") in p.enter else p for p in change(Swamp(2, iterates=2)(DENSITY, STEPS))]
    average = trained(phases, STEPS, seed, NOISY)
    return [state for state, _ in ends[-4:]], average


def worth_more(change: Change, seeds: int) -> None:
    barriers = []
    for seed in range(seeds):
        iterates, average = last_cycle(change, seed)
        assert sum(int((t != 0).sum()) for t in average.values() if t.dim() == 2) == keep_count(8832, DENSITY)
        assert accuracy(average) > max(accuracy(state) for state in iterates)
        first, second = iterates[1], iterates[3]
        half = {key: (first[key] + second[key]) / 2 for key in first}
        barriers.append((accuracy(first) + accuracy(second)) / 2 - accuracy(half))
    assert max(barriers) < 0.01, barriers


@check("swamp", WORTH, kind="method")
def test_the_average_is_worth_more() -> None:
    """Seen here, average and best of four iterates: 0.918 and 0.880, 0.911 and 0.907, 0.922 and 0.831; barriers of -2 to -3 points.

    The card expects that from unmatched starts (early=0) averages are worse than particles; on digits they were not:
    without the averaged part, two particles, five seeds, differences of -0.8 to +1.1 points, at some 3 points less accuracy.
    """
    pytest.importorskip("sklearn")
    worth_more(unchanged, 3)


@check("swamp", WORTH, kind="twin")
def test_particles_of_their_own_starts() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(AssertionError):
        worth_more(rewinds_of_their_own, 1)


@pytest.mark.parametrize("how", [Swamp(), Swamp(2, averaged=0), Swamp(3, iterates=2, early=0.0), Swamp(1, averaged=0.5, iterates=1)], ids=str)
@pytest.mark.parametrize("steps", [531, 800])
def test_every_step_has_its_phase(how: Swamp, steps: int) -> None:
    phases = how(0.64, steps)
    assert sum(p.until or 0 for p in phases) == steps and all((p.until or 0) >= 0 for p in phases)
    assert sum(Collect("mean") in p.enter for p in phases) == how.particles * 3 * (how.iterates if how.averaged else 1)


def test_a_stopped_run_ends_in_the_same_bytes(tmp_path: Any) -> None:
    pytest.importorskip("sklearn")

    class Stop(Exception): ...

    def stop(step: int, steps: int) -> None:
        if step == 97:
            raise Stop

    recipe, how = replace(SWAMP, phases=Swamp(2, iterates=2)), {"density": 0.64, "steps": 120, "save_every": 5}
    record = train(DIGITS, recipe, checkpoint_dir=tmp_path / "a", **how)  # type: ignore[arg-type]
    with pytest.raises(Stop):
        train(DIGITS, recipe, checkpoint_dir=tmp_path / "b", progress=stop, **how)  # type: ignore[arg-type]
    assert train(DIGITS, recipe, checkpoint_dir=tmp_path / "b", **how) == record  # type: ignore[arg-type]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_user_reaches_it(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    code, out, err = run(capsys, "train", "digits", "--recipe", "swamp", "--density", "0.64", "--steps", "210", "--json")
    assert code == 0, err
    assert sum(site["nnz"] for site in json.loads(out)["sites"]) == keep_count(8832, 0.64)
    with pytest.raises(BadInput, match="ask for at least"):
        SWAMP.phases(0.1, 100)
    assert rounds(0.64) == 2
