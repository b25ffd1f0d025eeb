"""ReMoE: a gate that is continuous, a load-weighted penalty, a strength that moves by a factor until K experts serve a row, and that survives a stop."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.core.control import Control
from rarefy.core.discover import train_recipes
from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Context, Entry, Scores
from rarefy.core.roles import Choice
from rarefy.core.trace import Trace
from rarefy.experts.banks.glu import GLU
from rarefy.experts.moe import MoE
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.relu import ReLURouting, SteeredSparsity, small
from rarefy.experts.routers.topk import TopK
from rarefy.experts.routing import dense
from rarefy.tasks.char_lm import CharLM
from rarefy.weights.train import train
from tests.evidence import check
from tests.papers.routed import Counting

SLUG = "remoe"


def continuous(choice: Choice) -> None:
    """As a row moves past the points where experts come and go, its output moves with it, and finite differences are the gradient on both sides."""
    torch.manual_seed(0)
    moe = MoE(Linear(6, 4), choice, GLU(4, 6, 5)).double()
    start, end = torch.randn(2, 6, dtype=torch.double)
    steps = torch.linspace(0, 1, 4001, dtype=torch.double)[:, None]
    path = (start + steps * (end - start)).requires_grad_()

    def outputs(x: Tensor) -> Tensor:
        logits = x @ moe.get_parameter("affinity.weight").T
        routing = choice(Scores(logits), Context())
        weight = dense(routing)
        return torch.stack([weight[:, e, None] * expert(x) for e, expert in enumerate(moe.bank.split())]).sum(0)

    with torch.no_grad():
        y, signs = outputs(path), path @ moe.get_parameter("affinity.weight").T > 0
    assert (signs[1:] != signs[:-1]).any(), "no expert comes or goes on this path"
    jumps = (y[1:] - y[:-1]).norm(dim=1)
    assert jumps.max() < 5e-3 * max(1.0, float(y.norm(dim=1).max())), f"the output jumps by {float(jumps.max()):.3g}"
    (grad,) = torch.autograd.grad(outputs(path).sum(), path)
    along = (grad * (end - start)).sum(1)
    differences = (y.sum(1)[2:] - y.sum(1)[:-2]) / (2 / 4000)
    still = ~(signs[2:] != signs[:-2]).any(1)
    torch.testing.assert_close(along[1:-1][still], differences[still], atol=1e-3, rtol=1e-3)


CONTINUOUS = "the output is continuous where experts come and go"


@check(SLUG, CONTINUOUS, kind="method")
def test_continuous() -> None:
    continuous(ReLURouting())


# The paper was not at hand and the rule of the strength is unverified: the twins are not marked, so that the row stays partial.
def test_continuous_twin() -> None:
    with pytest.raises(AssertionError, match="jumps"):
        continuous(TopK(1, renormalise=False))


class Plain(SteeredSparsity):
    """An L1 penalty, whatever the load."""

    def _penalty(self, entry: Entry) -> Tensor:
        return dense(entry.routing).sum() / entry.routing.items


def penalty_holds(part: SteeredSparsity) -> None:
    """Its gradient in W is the hand formula with n_e constant; padding counts in nothing; layers are averaged; outputs are not normalised."""
    torch.manual_seed(0)
    x, valid = torch.randn(30, 6), torch.arange(30) % 3 != 1
    moe = MoE(small(6, 4), ReLURouting(), GLU(4, 6, 5))
    with Trace(moe) as trace:
        moe(x, Context(valid=valid))
    weight = moe.get_parameter("affinity.weight")
    (got,) = torch.autograd.grad(part.loss({"strength": 0.5, "sparsity": 0.0}, trace.entries), weight, retain_graph=True)
    real = x[valid]
    active = real @ weight.T > 0
    n, rows = active.sum(0), len(real)
    want = torch.stack([0.5 * 4 / (2.0 * rows**2) * n[e] * real[active[:, e]].sum(0) for e in range(4)])
    torch.testing.assert_close(got, want)
    (twice,) = torch.autograd.grad(part.loss({"strength": 0.5, "sparsity": 0.0}, trace.entries * 2), weight)
    torch.testing.assert_close(twice, want)


PENALTY = "the penalty's gradient is load times L1, the load a constant"


@check(SLUG, PENALTY, kind="method")
def test_penalty() -> None:
    penalty_holds(SteeredSparsity(2.0))


def test_penalty_twin() -> None:
    with pytest.raises(AssertionError):
        penalty_holds(Plain(2.0))


class Unsteered(SteeredSparsity):
    """The strength stays what it was."""

    def after_step(self, state: dict[str, Any], layers: Mapping[str, Any], entries: Sequence[Entry], optimizer: Any) -> dict[str, Any]:
        return {**super().after_step(state, layers, entries, optimizer), "strength": state["strength"]}


@cache
def trained(part: SteeredSparsity, steps: int) -> tuple[list[dict[str, float]], float]:
    """The controller's states on text, step by step, for 8 experts of which 2 are wanted, and the loads' coefficient of variation over the last 150."""
    task = CharLM(width=32, experts=8, rows=64)
    model: Any = task.model(0, router="relu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    control, states, load = Control(model, optimizer, (part,)), [], torch.zeros(8)
    for step in range(steps):
        optimizer.zero_grad()
        with Trace(model) as trace:
            loss = task.loss(model, task.batch(0, step))
        control.loss(loss).backward()
        optimizer.step()
        states.append(control.states[0])
        load += trace.entries[0].routing.counts() * (step >= steps - 150)
    return states, float(load.std(correction=0) / load.mean())


def reaches(part: SteeredSparsity, steps: int = 400) -> None:
    """From the paper's 1e-8 by its factor 1.2: each step up where too many experts were busy, else down; dense at first, and in the end 2 of 8 within 5%.

    Seeds 0 and 1 ended at 1.97 and 2.07 experts per row over the last 150 of 400 steps, after 6.3 and 7.5 in the dense stage.
    """
    states, _ = trained(part, steps)
    strengths = [1e-8, *(state["strength"] for state in states)]
    for before, after, state in zip(strengths, strengths[1:], states, strict=False):
        assert after == pytest.approx(before * (1.2 if state["sparsity"] < 1 - 2 / 8 else 1 / 1.2), rel=1e-12)
    served = [8 * (1 - state["sparsity"]) for state in states]
    assert max(served[:100]) > 5
    assert sum(served[-150:]) / 150 == pytest.approx(2.0, rel=0.05)


REACHES = "the strength moves by a factor of 1.2 until K experts serve a row, within 5%"


@check(SLUG, REACHES, kind="method")
def test_reaches() -> None:
    reaches(SteeredSparsity(2.0))


def test_reaches_twin() -> None:
    with pytest.raises(AssertionError):
        reaches(Unsteered(2.0), 150)


def spreads(part: SteeredSparsity) -> None:
    """Loads vary less over experts than under plain L1. Seeds 0 and 1: 0.84 and 0.50 against 1.10 and 0.87."""
    assert trained(part, 400)[1] < 0.9 * trained(Plain(2.0), 400)[1]


SPREADS = "on text the load is more even than under plain L1"


@check(SLUG, SPREADS, kind="method")
def test_spreads() -> None:
    spreads(SteeredSparsity(2.0))


def test_spreads_twin() -> None:
    with pytest.raises(AssertionError):
        spreads(Plain(2.0))


def resumes(part: SteeredSparsity, saved: Callable[[Control], dict[str, Any]]) -> None:
    """Stopped after two steps, saved as JSON and resumed in a new model, the strength goes on as if nothing had happened."""
    task = CharLM(width=16, experts=4, rows=16)

    def steps(model: Any, control: Control, optimizer: Any, which: range) -> list[float]:
        found = []
        for step in which:
            optimizer.zero_grad()
            control.loss(task.loss(model, task.batch(0, step))).backward()
            optimizer.step()
            found.append(control.states[0]["strength"])
        return found

    def made(weights: Any = None) -> tuple[Any, Control, Any]:
        model = task.model(0, router="relu")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if weights is not None:
            model.load_state_dict(weights)
        return model, Control(model, optimizer, (part,)), optimizer

    whole = steps(*made(), range(6))
    first = made()
    begun = steps(*first, range(2))
    again = made(copy.deepcopy(first[0].state_dict()))
    again[1].load_state_dict(json.loads(json.dumps(saved(first[1]))))
    assert begun + steps(*again, range(2, 6)) == whole and whole[0] != whole[1]


def without_the_state(control: Control) -> dict[str, Any]:
    """A checkpoint of the model alone."""
    return {"controllers": [repr(c) for c in control.controllers], "states": [c.start({}) for c in control.controllers]}


RESUMES = "a resumed run has the same strengths, to the last bit"


@check(SLUG, RESUMES, kind="method")
def test_resumes() -> None:
    resumes(SteeredSparsity(1.0), Control.state_dict)


def test_resumes_twin() -> None:
    with pytest.raises(AssertionError):
        resumes(SteeredSparsity(1.0), without_the_state)


def test_idle_experts_are_not_run_and_rows_without_any_are_zero() -> None:
    torch.manual_seed(0)
    bank, x = Counting(4, 6, 5), torch.randn(20, 6)
    moe = MoE(Linear(6, 4), ReLURouting(), bank)
    with torch.no_grad():
        moe.get_parameter("affinity.weight")[:2].zero_()
    y, logits = moe(x), x @ moe.get_parameter("affinity.weight").T
    assert bank.rows == int((logits > 0).sum()) < 40
    nobody = (logits <= 0).all(1)
    assert nobody.any() and torch.equal((y == 0).all(1), nobody)


def test_the_training_flow_steers_and_checkpoints_the_strength(tmp_path: Any) -> None:
    task, recipe = CharLM(width=16, rows=16), train_recipes()["static"]
    options: dict[str, Any] = {"density": 1.0, "steps": 6, "options": {"router": "relu:target=1.0"}, "save_every": 3}

    def stop(step: int, steps: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    train(task, recipe, checkpoint_dir=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(task, recipe, checkpoint_dir=tmp_path / "stopped", progress=stop, **options)
    train(task, recipe, checkpoint_dir=tmp_path / "stopped", **options)
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes() for name in ("model.safetensors", "checkpoint.safetensors"))


def test_accumulated_forwards_each_count_once() -> None:
    """Two forwards and their backwards before one step: each is penalised for itself, and the step measures both."""
    task = CharLM(width=8, experts=4, rows=8)
    model: Any = task.model(0, router="relu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    control, active = Control(model, optimizer, (SteeredSparsity(1.0, start_at=1.0),)), 0
    for step in range(2):
        with Trace(model) as trace:
            loss = task.loss(model, task.batch(0, step))
        whole = control.loss(loss)
        assert float((whole - loss).detach()) == pytest.approx(float(SteeredSparsity(1.0)._penalty(trace.entries[0]).detach()), rel=1e-4)
        whole.backward()
        with torch.no_grad():
            task.loss(model.eval(), task.batch(0, 9))
        model.train()
        active += int(trace.entries[0].routing.counts().sum())
    optimizer.step()
    assert control.states[0]["sparsity"] == pytest.approx(1 - active / (2 * 8 * 4))


def test_a_step_without_the_penalty_and_wrong_values_are_refused() -> None:
    task = CharLM(width=8, rows=8)
    model = task.model(0, router="relu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Control(model, optimizer, ReLURouting().controllers)
    task.loss(model, task.batch(0, 0)).backward()
    with pytest.raises(Refused, match=r"control\.loss"):
        optimizer.step()
    with pytest.raises(BadInput, match="factor is above 1"):
        SteeredSparsity(1.0, factor=1.0)
