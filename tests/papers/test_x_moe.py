"""X-MoE: scores by angle alone in a space of few dimensions, a learned temperature that the balance loss leaves alone, centres of one length, and the collapse that it avoids."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rarefy.core.control import Control
from rarefy.core.discover import train_recipes
from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Scores
from rarefy.core.roles import Choice
from rarefy.core.trace import Trace
from rarefy.experts.balance.at_temperature import AtTemperature
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.banks.glu import GLU
from rarefy.experts.freeze import freeze_experts
from rarefy.experts.moe import MoE
from rarefy.experts.routers.cosine import ByAngle, ByAngleSigmoid, Cosine, KeepLengths
from rarefy.probes.collapse import agreement, collapse, consistency
from rarefy.tasks.char_lm import CharLM
from rarefy.weights.train import train
from tests.evidence import check

SLUG = "x-moe"
WIDTH, EXPERTS = 12, 8


def rows(count: int = 40, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def scores_hold(affinity: Callable[..., Cosine]) -> None:
    """A row's length and a centre's change nothing; what all scores pull a row by has rank E/2 at most."""
    torch.manual_seed(0)
    router = affinity(WIDTH, EXPERTS)

    def logits(x: Tensor) -> Tensor:
        found: Tensor = router(x, Context(), None).logits
        return found

    x = rows()
    plain = logits(x)
    for scale in (0.01, 30.0):
        torch.testing.assert_close(logits(scale * x), plain, atol=1e-4, rtol=1e-4)
    leaf = x.clone().requires_grad_()
    (pull,) = torch.autograd.grad((logits(leaf) * rows(40, EXPERTS, 1)).sum(), leaf)
    assert int(torch.linalg.matrix_rank(pull, rtol=1e-4)) == EXPERTS // 2
    with torch.no_grad():
        router.centres.mul_(torch.linspace(0.5, 20.0, EXPERTS)[:, None])
    torch.testing.assert_close(logits(x), plain, atol=1e-4, rtol=1e-4)


class ByTheCentresAlone(Cosine):
    """What torchscale does: the row is not scaled."""

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        low = x @ self.reduce.T
        return Scores(low @ nn.functional.normalize(self.centres, dim=1).T)


class InTheWholeSpace(Cosine):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__(width, experts, space=width)


class DotProduct(Cosine):
    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        return Scores(nn.functional.normalize(x @ self.reduce.T, dim=1) @ self.centres.T)


SCORES = "scores do not depend on lengths, and pull rows in a space of E/2 dimensions"


@check(SLUG, SCORES, kind="method")
def test_scores() -> None:
    scores_hold(Cosine)


@check(SLUG, SCORES, kind="twin")
@pytest.mark.parametrize("twin", [ByTheCentresAlone, InTheWholeSpace, DotProduct])
def test_scores_twins(twin: type[Cosine]) -> None:
    with pytest.raises(AssertionError):
        scores_hold(twin)


@check(SLUG, SCORES, kind="oracle")
def test_scores_against_numpy() -> None:
    torch.manual_seed(0)
    router, x = Cosine(WIDTH, EXPERTS, temperature=0.3), rows(5)
    reduce, centres = (p.detach().double().numpy() for p in (router.reduce, router.centres))
    for r, row in enumerate(x.double().numpy()):
        low = [float(np.dot(w, row)) for w in reduce]
        for e, centre in enumerate(centres):
            cosine = float(np.dot(low, centre)) / (float(np.dot(low, low)) ** 0.5 * float(np.dot(centre, centre)) ** 0.5)
            assert float(router(x, Context(), None).logits[r, e]) == pytest.approx(cosine / 0.3, abs=1e-5)


def temperature_holds(choice: type[Choice]) -> None:
    """The task moves tau; the balance loss does not, has the value of its own temperature and moves the centres."""
    torch.manual_seed(0)
    assert choice.affinity is not None
    moe = MoE(choice.affinity(WIDTH, EXPERTS), choice(), GLU(EXPERTS, WIDTH, 6))
    tau, centres = moe.get_parameter("affinity.temperature"), moe.get_parameter("affinity.centres")
    first = float(tau.detach())
    assert first == pytest.approx({"by-angle": 0.3, "by-angle-sigmoid": 0.07}[choice.name])
    with torch.no_grad():
        tau.fill_(2.0)
    with Trace(moe) as trace:
        y = moe(rows())
    (balance,) = choice.balances
    loss = balance(trace.entries[0])
    found, z = trace.entries[0].routing, moe.affinity(rows(), Context(), moe.bank).logits
    likelihood = {"by-angle": z.softmax(-1), "by-angle-sigmoid": z.sigmoid()}[choice.name]
    served = found.expert < EXPERTS
    torch.testing.assert_close(found.weight[served], likelihood[served].gather(1, found.expert[served, None]).squeeze(1))
    cosines = trace.entries[0].routing.scores.select  # type: ignore[union-attr]
    p, f = (cosines / first).softmax(-1).mean(0), trace.entries[0].routing.counts() / 40
    torch.testing.assert_close(loss, 0.01 * EXPERTS * (f * p).sum())
    by_loss = torch.autograd.grad(loss, [tau, centres], retain_graph=True, allow_unused=True)
    (by_task,) = torch.autograd.grad(y.square().sum(), tau)
    assert by_loss[0] is None, "the balance loss moves the temperature"
    assert by_loss[1].abs().sum() > 0 and by_task.abs() > 1e-4


class OneTemperature(ByAngle):
    balances = (LoadBalance(0.01),)


TAU = "the task learns the temperature, the balance loss has a fixed one"


@check(SLUG, TAU, kind="method")
@pytest.mark.parametrize("choice", [ByAngle, ByAngleSigmoid])
def test_temperature(choice: type[Choice]) -> None:
    temperature_holds(choice)


class SoftmaxAtItsTemperature(ByAngleSigmoid):
    """The temperature of the sigmoid, and a softmax."""

    def __call__(self, scores: Scores, context: Context) -> Any:
        return ByAngle()(scores, context)


@check(SLUG, TAU, kind="twin")
@pytest.mark.parametrize("twin", [OneTemperature, SoftmaxAtItsTemperature])
def test_temperature_twin(twin: type[Choice]) -> None:
    with pytest.raises(AssertionError):
        temperature_holds(twin)


def lengths_hold(choice: type[Choice]) -> None:
    """Trained, every centre has length 1.5 at the start and after every step, whatever the optimizer did to it."""
    torch.manual_seed(0)
    assert choice.affinity is not None
    moe = MoE(choice.affinity(WIDTH, EXPERTS), choice(), GLU(EXPERTS, WIDTH, 6))
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1, weight_decay=0.1)
    control = Control(moe, optimizer, choice.controllers)
    for step in range(4):
        torch.testing.assert_close(moe.get_parameter("affinity.centres").norm(dim=1), torch.full((EXPERTS,), 1.5))
        optimizer.zero_grad()
        moe(rows(seed=step)).square().mean().backward()
        optimizer.step()
    control.close()
    optimizer.step()
    assert not torch.allclose(moe.get_parameter("affinity.centres").norm(dim=1), torch.tensor(1.5))


class OnceAtTheStart(KeepLengths):
    def after_step(self, state: dict[str, Any], layers: Any, entries: Any, optimizer: Any) -> dict[str, Any]:
        return state


class Unkept(ByAngle):
    controllers = (OnceAtTheStart(),)


LENGTHS = "every centre has length 1.5 after every step"


@check(SLUG, LENGTHS, kind="method")
@pytest.mark.parametrize("choice", [ByAngle, ByAngleSigmoid])
def test_lengths(choice: type[Choice]) -> None:
    lengths_hold(choice)


@check(SLUG, LENGTHS, kind="twin")
def test_lengths_twin() -> None:
    with pytest.raises(AssertionError):
        lengths_hold(Unkept)


def measure_holds(measure: Callable[[Tensor, Tensor], float]) -> None:
    """On planted clusters it falls as they tighten, whatever the scale of the rows."""
    g = torch.Generator().manual_seed(0)
    centres, noise, expert = torch.randn(6, 10, generator=g), torch.randn(600, 10, generator=g), torch.arange(600) % 6
    found = [measure(centres[expert] + spread * noise, expert) for spread in (3.0, 1.0, 0.3, 0.1, 0.0)]
    assert found == sorted(found, reverse=True) and found[-1] == pytest.approx(0.0, abs=1e-9) and found[0] > 100 * found[-2]
    x = centres[expert] + noise
    assert measure(7.0 * x, expert) == pytest.approx(measure(x, expert), rel=1e-6)


COLLAPSE = "the collapse measure falls as planted clusters tighten, whatever the scale"


@check(SLUG, COLLAPSE, kind="method")
def test_collapse() -> None:
    measure_holds(collapse)


@check(SLUG, COLLAPSE, kind="twin")
def test_collapse_twin_without_the_centres() -> None:
    def within(x: Tensor, expert: Tensor) -> float:
        return float(torch.stack([x[expert == e].var(0, correction=0).sum() for e in range(6)]).mean())

    with pytest.raises(AssertionError):
        measure_holds(within)


@check(SLUG, COLLAPSE, kind="oracle")
def test_collapse_against_numpy() -> None:
    x, expert = rows(60, 5).double().numpy(), np.arange(60) % 7 % 3
    means = np.stack([x[expert == e].mean(0) for e in range(3)])
    within = np.cov((x - means[expert]).T, bias=True)
    between = np.cov(means[expert].T, bias=True)
    assert collapse(torch.from_numpy(x), torch.from_numpy(expert)) == pytest.approx(float(np.trace(within @ np.linalg.pinv(between, rcond=1e-10))), rel=1e-6)


def test_the_training_flow_keeps_lengths_and_resumes(tmp_path: Any) -> None:
    task, recipe = CharLM(width=16, rows=16), train_recipes()["static"]

    def stop(step: int, steps: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"density": 1.0, "steps": 6, "options": {"router": "by-angle"}, "save_every": 3}
    train(task, recipe, checkpoint_dir=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(task, recipe, checkpoint_dir=tmp_path / "stopped", progress=stop, **options)
    train(task, recipe, checkpoint_dir=tmp_path / "stopped", **options)
    whole, stopped = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "stopped"))
    assert whole == stopped
    from safetensors.torch import load

    torch.testing.assert_close(load(whole)["moe.affinity.centres"].norm(dim=1), torch.full((4,), 1.5))


def test_consistency_and_agreement() -> None:
    """Experts keep their names over runs: two runs whose loads are permuted are not consistent."""
    assert consistency(torch.tensor([[5.0, 1.0, 0.0]] * 3)) == pytest.approx(1.0)
    assert consistency(torch.tensor([[5.0, 1.0, 0.0], [0.0, 1.0, 5.0]])) < 0.3
    assert consistency(torch.ones(2, 3)) == pytest.approx(0.5)
    assert agreement(torch.tensor([0, 1]), torch.tensor([0, 2])) == 0.5


def test_fine_tuning_freezes_routers_and_experts() -> None:
    model = CharLM(width=8).model(0, router="by-angle")
    frozen = freeze_experts(model)
    assert {"moe.affinity.temperature", "moe.affinity.centres", "moe.bank.down_proj"} <= {*frozen}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {*frozen}
    with pytest.raises(BadInput, match="router or experts"):
        freeze_experts(nn.Linear(1, 1))


def test_what_is_not_finite_and_what_is_refused() -> None:
    router, x = Cosine(WIDTH, EXPERTS), rows(3)
    x[1, 0] = float("nan")
    logits = router(x, Context(), None).logits
    assert torch.isfinite(logits).all() and torch.equal(logits[[0, 2]], router(x[[0, 2]], Context(), None).logits)
    with pytest.raises(BadInput, match="temperature 0"):
        Cosine(4, 2, temperature=0.0)
    with pytest.raises(BadInput, match="this control has"):
        Control(nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)], lr=1.0), ()).load_state_dict({"controllers": ["KeepLengths()"], "states": [{}]})
    copied = copy.deepcopy(AtTemperature(0.3))
    with pytest.raises(BadInput, match="before the temperature"):
        moe = MoE(Cosine(4, 2), ByAngle(), GLU(2, 4, 3))
        with Trace(moe) as trace:
            moe(torch.randn(3, 4), Context(routing=ByAngle()(Scores(torch.zeros(3, 2)), Context())))
        copied(trace.entries[0])
