"""The routed character model trains through the ordinary training flow, and its router moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rarefy.core.discover import methods, train_recipes
from rarefy.core.roles import Task
from rarefy.tasks.char_lm import CharLM
from rarefy.weights.train import train


def test_training_beats_the_start_and_is_reproducible() -> None:
    assert methods(Task)["char_lm"] is CharLM
    task, recipe = CharLM(width=32, rows=64), train_recipes()["static"]
    start = task.evaluate(task.model(0))
    runs = [train(task, recipe, density=1.0, steps=40) for _ in range(2)]
    assert runs[0]["metric"] == runs[1]["metric"]
    assert runs[0]["metric"]["loss"] < start["loss"] - 1.0


def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    task, recipe = CharLM(width=16, rows=32), train_recipes()["static"]

    def stop(step: int, steps: int) -> None:
        if step == 7:
            raise KeyboardInterrupt

    train(task, recipe, density=0.5, steps=12, checkpoint_dir=tmp_path / "whole", save_every=5)
    with pytest.raises(KeyboardInterrupt):
        train(task, recipe, density=0.5, steps=12, checkpoint_dir=tmp_path / "stopped", save_every=5, progress=stop)
    train(task, recipe, density=0.5, steps=12, checkpoint_dir=tmp_path / "stopped", save_every=5)
    whole, stopped = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "stopped"))
    assert whole == stopped


def test_the_router_learns() -> None:
    task = CharLM(width=16, rows=64)
    model = task.model(0)
    task.loss(model, task.batch(0, 0)).backward()
    grad = model.get_parameter("moe.affinity.weight").grad
    assert grad is not None and torch.isfinite(grad).all() and grad.abs().sum() > 0
