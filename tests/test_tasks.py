"""Every task that `rarefy train` names: made from a seed alone, its figures finite, the caller's random state and the model's mode as before."""

from __future__ import annotations

import math

import pytest
import torch

from rarefy.core.discover import methods
from rarefy.core.roles import Task

TASKS = methods(Task)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_a_function_of_its_seed(name: str) -> None:
    task, state = TASKS[name](), torch.get_rng_state()
    model, again = task.model(3), task.model(3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    losses = [task.loss(m, task.batch(3, 5)) for m in (model, again)]
    assert losses[0].item() == losses[1].item() and math.isfinite(losses[0].item())
    losses[0].backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("name", TASKS)
def test_a_task_evaluates_without_a_trace_of_it(name: str) -> None:
    task = TASKS[name]()
    model = task.model(3).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = task.evaluate(model), task.evaluate(model)
    assert first == second and all(math.isfinite(value) for value in first.values())
    assert model.training and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
