"""The routed character model trains through the ordinary training flow, and its router moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rarefy.core.discover import methods, train_recipes
from rarefy.core.errors import BadInput
from rarefy.core.roles import Choice, Task
from rarefy.core.trace import Trace
from rarefy.experts.banks.glu import GLU
from rarefy.experts.routers.linear import Linear
from rarefy.tasks.char_lm import CharLM
from rarefy.tasks.digits import Digits
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


@pytest.mark.parametrize("router", methods(Choice))
def test_every_router_trains_by_its_name(router: str) -> None:
    task = CharLM(width=16, rows=64)
    record = train(task, train_recipes()["static"], density=1.0, steps=25, options={"router": router})
    assert record["options"] == {"router": router}
    assert record["metric"]["loss"] < task.evaluate(task.model(0, router=router))["loss"] - 0.5
    assert 0.1 <= record["metric"]["experts"] <= task.experts  # where experts do not compete a row may go without
    model = task.model(0, router=router)
    with Trace(model) as trace:
        model(task.batch(0, 0)[0])
    assert trace.entries[0].layer.choice == methods(Choice)[router]()
    kind = methods(Choice)[router]()
    assert type(model.moe.affinity) is type((kind.affinity or Linear)(8, 4)) and type(model.moe.bank) is type((kind.bank or GLU)(4, 8, 8))
    assert model.balances == methods(Choice)[router].balances and model.moe.overflow == methods(Choice)[router].overflow


def test_a_router_takes_its_hyper_parameters_and_another_name_is_refused() -> None:
    experts = [CharLM(width=16, router=f"top-p:p={p}").evaluate(CharLM(width=16).model(0, router=f"top-p:p={p}"))["experts"] for p in (0.1, 0.5, 1.0)]
    assert 1.0 == experts[0] < experts[1] < experts[2] == 4.0
    with pytest.raises(BadInput, match=r"choice 'none-such': known are .*gap, .*top-p, topk"):
        CharLM().model(0, router="none-such")
    with pytest.raises(BadInput, match="router of the task digits"):
        Digits().model(0, router="topk")


def test_the_loss_holds_the_routers_balance_losses() -> None:
    task = CharLM(width=16, rows=32)
    for router in ("topk", "top-p", "mass-before"):
        model = task.model(0, router=router)
        whole = task.loss(model, task.batch(0, 0))
        with Trace(model) as trace:
            model(task.batch(0, 0)[0])
        share = sum(float(balance(trace.entries[0])) for balance in model.balances)
        model.balances = ()
        assert share > 0 and float(whole - task.loss(model, task.batch(0, 0))) == pytest.approx(share, rel=1e-3)
