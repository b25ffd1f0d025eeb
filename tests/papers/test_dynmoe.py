"""DynMoE: thresholds passed, equal weights and a straight-through gradient; no row without an expert in evaluation; experts that serve nobody leave, and one comes for rows that none served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rarefy.core.control import Control
from rarefy.core.discover import train_recipes
from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Routing, Scores
from rarefy.experts.balance.switch_balance import valid_rows
from rarefy.experts.banks.glu import GLU
from rarefy.experts.moe import MoE
from rarefy.experts.routers.top_any import ExpertTurnover, Thresholds, TopAny, turn_over
from rarefy.experts.routing import dense, per_row
from rarefy.tasks.char_lm import CharLM
from rarefy.weights.train import train
from tests.evidence import check

SLUG = "dynmoe"
TRAINING = Context(training=True)


def rows(count: int, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def drawn(affinity: type[Thresholds], experts: int = 4) -> Thresholds:
    torch.manual_seed(0)
    router = affinity(6, experts)
    with torch.no_grad():
        router.gates.copy_(torch.linspace(-0.4, 0.4, experts))
    return router


Choose = Callable[[Scores, Context], Routing]


def choice_holds(choice: Choose, affinity: type[Thresholds] = Thresholds) -> None:
    """Active where s > theta, at weight 1/k; dL/dG is the straight-through formula; none may pass in training, one is taken outside it."""
    router, x, values = drawn(affinity), rows(60), rows(4, 1, seed=3)[:, 0]
    s = (nn.functional.normalize(x, dim=1) @ nn.functional.normalize(router.centres, dim=1).T).sigmoid()
    theta = router.gates.sigmoid()
    active = s > theta
    k = active.sum(1)
    assert (k == 0).any() and k.max() > 1
    weight = dense(choice(router(x, TRAINING, None), TRAINING))
    torch.testing.assert_close(weight, active / k.clamp(min=1)[:, None])
    (grad,) = torch.autograd.grad((weight @ values).sum(), router.gates)
    want = -(active / k.clamp(min=1)[:, None]).sum(0) * values * theta * (1 - theta)
    torch.testing.assert_close(grad, want.detach())
    routing = choice(router(x, Context(), None), Context())
    assert (per_row(routing) >= 1).all(), "a row of evaluation has no expert"
    torch.testing.assert_close(dense(routing)[k == 0], nn.functional.one_hot(s.argmax(1), 4)[k == 0].float())
    torch.testing.assert_close(dense(routing)[k > 0], weight[k > 0])


class ByScore(TopAny):
    """Weighed by how far a row is above the threshold."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = super().__call__(scores, context)
        return Routing(r.expert, scores.logits.relu().flatten() * (r.expert < r.experts), r.items, r.experts, r.k, scores=scores)


class Hard(TopAny):
    """No gradient passes the sign."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = super().__call__(scores, context)
        return Routing(r.expert, r.weight.detach() + 0.0 * r.weight, r.items, r.experts, r.k, scores=scores)


class AsInTraining(TopAny):
    """Evaluation too leaves rows without an expert."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return super().__call__(scores, TRAINING)


CHOICE = "every expert whose threshold is passed, at equal weights, straight through; at least one outside training"


@check(SLUG, CHOICE, kind="method")
def test_choice() -> None:
    choice_holds(TopAny())


@check(SLUG, CHOICE, kind="twin")
@pytest.mark.parametrize("twin", [ByScore, Hard, AsInTraining])
def test_choice_twins(twin: type[TopAny]) -> None:
    with pytest.raises(AssertionError):
        choice_holds(twin())


@check(SLUG, CHOICE, kind="oracle")
def test_layer_against_numpy() -> None:
    router, x = drawn(Thresholds), rows(9)
    bank = GLU(4, 6, 5)
    moe = MoE(router, TopAny(), bank)
    w, g = (p.detach().double().numpy() for p in (router.centres, router.gates))
    outputs = torch.stack([expert(x) for expert in bank.split()]).detach().double().numpy()
    for training in (True, False):
        y = moe.train(training)(x).detach()
        for r, row in enumerate(x.double().numpy()):
            s = [1 / (1 + np.exp(-float(row @ w[e]) / float(np.linalg.norm(row) * np.linalg.norm(w[e])))) for e in range(4)]
            active = [e for e in range(4) if s[e] > 1 / (1 + np.exp(-g[e]))] or ([] if training else [int(np.argmax(s))])
            want = np.mean([outputs[e, r] for e in active], axis=0) if active else np.zeros(6)
            torch.testing.assert_close(y[r].double(), torch.from_numpy(want), atol=1e-5, rtol=1e-5)


Turn = Callable[[Any, Tensor, Tensor, Any], None]


def turnover_holds(turn: Turn) -> None:
    """Exactly the experts without a row leave; one comes, in the direction of what was missed, which it then catches; its moments start at zero."""
    torch.manual_seed(0)
    router = Thresholds(6, 5, first=4)
    with torch.no_grad():
        router.centres.copy_(torch.eye(6)[:5])
        router.centres[1] = -torch.eye(6)[0]  # served by the rows against the first axis
    moe = MoE(router, TopAny(), GLU(5, 6, 3))
    optimizer = torch.optim.Adam(moe.parameters(), lr=1e-3)
    x = 0.01 * rows(40) + torch.eye(6)[0] * torch.where(torch.arange(40) % 2 == 0, 3.0, -3.0)[:, None]
    x[30:] = -torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 9.0])  # against axes 2 and 3, and orthogonal to 0 and 1
    x[30:, 0] = 0.0
    moe(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        router.centres.copy_(torch.eye(6)[:5])
        router.centres[1] = -torch.eye(6)[0]
        router.gates.copy_(torch.tensor([0.0, 0.0, 0.9, 0.9, 0.5]))
    routing = moe.choice(router(x, TRAINING, None), TRAINING)
    assert routing.counts().tolist() == [15, 15, 0, 0, 0] and (per_row(routing)[30:] == 0).all()
    before = [p.detach().clone() for p in moe.bank.parameters()]
    turn(moe, routing.counts(), x[per_row(routing) == 0].sum(0), optimizer)
    assert router.live.tolist() == [True, True, True, False, False], "two served nobody, and the first free place was taken"
    torch.testing.assert_close(router.centres[2].norm(), torch.tensor(1.0))
    torch.testing.assert_close(router.centres[2], nn.functional.normalize(x[30:].sum(0), dim=0))
    assert float(router.gates[2].detach()) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, moe.bank.parameters(), strict=True)), "the place's expert keeps its weights"
    for parameter in (router.centres, router.gates, *moe.bank.parameters()):
        for moment in (optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg_sq"]):
            assert not moment[2].any() and moment[0].any()
    caught = moe.choice(router(x, TRAINING, None), TRAINING)
    assert torch.equal(dense(caught)[30:], nn.functional.one_hot(torch.full((10,), 2), 5).float())


def keeps_moments(layer: Any, served: Tensor, missed: Tensor, optimizer: Any) -> None:
    turn_over(layer, served, missed, torch.optim.SGD([torch.zeros(1)], lr=0.1))


def unscaled(layer: Any, served: Tensor, missed: Tensor, optimizer: Any) -> None:
    turn_over(layer, served, missed, optimizer)
    with torch.no_grad():
        layer.affinity.centres[2] *= missed.norm()


def never_drops(layer: Any, served: Tensor, missed: Tensor, optimizer: Any) -> None:
    turn_over(layer, torch.ones_like(served), missed, optimizer)


TURNOVER = "experts without a row leave, and one comes in the direction of the rows that none served"


@check(SLUG, TURNOVER, kind="method")
def test_turnover() -> None:
    turnover_holds(turn_over)


@check(SLUG, TURNOVER, kind="twin")
@pytest.mark.parametrize("twin", [keeps_moments, unscaled, never_drops])
def test_turnover_twins(twin: Turn) -> None:
    with pytest.raises(AssertionError):
        turnover_holds(twin)


def records_hold(controller: ExpertTurnover) -> None:
    """Over two recorded steps: the rows of every expert, and the sum of the rows that none served, padding left out."""
    torch.manual_seed(0)
    moe = MoE(drawn(Thresholds), TopAny(), GLU(4, 6, 3))
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.0)
    control, served, missed = Control(moe, optimizer, (controller,)), torch.zeros(4, dtype=torch.long), torch.zeros(6)
    for seed in range(2):
        x, valid = rows(60, seed=seed), torch.arange(60) < 50
        routing = moe.choice(moe.affinity(x, TRAINING, None), Context(training=True, valid=valid))
        alone = (per_row(routing) == 0) & valid
        assert 0 < int(alone.sum()) < 50
        served, missed = served + routing.counts(), missed + x[alone].sum(0)
        control.loss(moe(x, Context(valid=valid)).sum()).backward()
        optimizer.step()
    state = control.states[0]
    assert state["served"] == {"": served.tolist()}
    torch.testing.assert_close(torch.tensor(state["missed"][""]), missed)


class AddsEveryRow(ExpertTurnover):
    """The sum of all rows, whoever served them."""

    def _unserved(self, entry: Any) -> Tensor:
        assert entry.x is not None
        return entry.x[valid_rows(entry)].sum(0)


class LastStep(ExpertTurnover):
    """Only the last recorded step."""

    def after_step(self, state: dict[str, Any], *rest: Any) -> dict[str, Any]:
        return super().after_step({**state, "served": {}, "missed": {}}, *rest)


RECORDS = "recorded are the rows of every expert and the sum of the rows that none served"


@check(SLUG, RECORDS, kind="method")
def test_records() -> None:
    records_hold(ExpertTurnover(3, 3))


@check(SLUG, RECORDS, kind="twin")
@pytest.mark.parametrize("twin", [AddsEveryRow, LastStep])
def test_records_twins(twin: type[ExpertTurnover]) -> None:
    with pytest.raises(AssertionError):
        records_hold(twin(3, 3))


class ForgetsWhoIsLive(Thresholds):
    """The mask is no part of the state dict."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        live = self.live
        del self._buffers["live"]
        self.register_buffer("live", live, persistent=False)


def round_trip_holds(affinity: type[Thresholds]) -> None:
    """What leaves and comes is in the state dict: a new layer that loads it routes alike. The losses see the live experts alone."""
    router, x = drawn(affinity), rows(30)
    router.live[1] = False
    again = affinity(6, 4)
    again.load_state_dict(router.state_dict())
    for context in (TRAINING, Context()):
        found = TopAny()(router(x, context, None), context)
        assert torch.equal(TopAny()(again(x, context, None), context).expert, found.expert)
        assert found.counts()[1] == 0
    with torch.no_grad():
        router.centres[1] = 5 * router.centres[0]
    losses = router(x, TRAINING, None).losses
    assert float(losses["diversity"].detach()) == pytest.approx(0.0, abs=1e-6) and float(losses["simplicity"].detach()) == pytest.approx(0.01, abs=1e-6)
    with torch.no_grad():
        router.centres[2] = router.centres[0]
    assert float(router(x, TRAINING, None).losses["diversity"].detach()) == pytest.approx(0.01 * 2**0.5, abs=1e-6)


class AllCounted(Thresholds):
    """The losses are of dead experts too."""

    def _losses(self, unit: Tensor) -> dict[str, Tensor]:
        live = self.live
        self.live = torch.ones_like(live)
        losses = super()._losses(unit)
        self.live = live
        return losses


ROUND_TRIP = "who is live survives a checkpoint, and the losses see them alone"


@check(SLUG, ROUND_TRIP, kind="method")
def test_round_trip() -> None:
    round_trip_holds(Thresholds)


@check(SLUG, ROUND_TRIP, kind="twin")
@pytest.mark.parametrize("twin", [ForgetsWhoIsLive, AllCounted])
def test_round_trip_twins(twin: type[Thresholds]) -> None:
    with pytest.raises(AssertionError):
        round_trip_holds(twin)


def test_only_the_recorded_steps_count_and_one_expert_stays() -> None:
    """Two of three steps are recorded: what the third routes changes nothing; padding and evaluation do not count; nobody served leaves the mask."""
    torch.manual_seed(0)
    moe = MoE(Thresholds(6, 4), TopAny(), GLU(4, 6, 3))
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.0)
    control, seen = Control(moe, optimizer, (ExpertTurnover(2, 3),)), []
    with torch.no_grad():
        moe.affinity.gates.fill_(9.0)
    for _ in range(3):
        moe(rows(10), Context(valid=torch.arange(10) < 6))
        moe.eval()(rows(50))
        control.loss(moe.train()(rows(4)).sum()).backward()
        optimizer.step()
        seen.append((control.states[0]["step"], {**control.states[0]["served"]}, moe.affinity.live.tolist()))
    assert seen[0][1] == {"": [0, 0, 0, 0]} and seen[1][1] == seen[2][1] == {}
    assert [live for _, _, live in seen] == [[True] * 4] * 3, "there is no free place, and one expert at least stays"


def test_the_training_flow_turns_experts_over_and_resumes(tmp_path: Any) -> None:
    task, recipe = CharLM(width=16, experts=6, rows=16), train_recipes()["static"]
    options: dict[str, Any] = {"density": 1.0, "steps": 9, "options": {"router": "top-any:first=3,record=2,every=4"}, "save_every": 3}

    def stop(step: int, steps: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    train(task, recipe, checkpoint_dir=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(task, recipe, checkpoint_dir=tmp_path / "stopped", progress=stop, **options)
    train(task, recipe, checkpoint_dir=tmp_path / "stopped", **options)
    whole, stopped = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "stopped"))
    assert whole == stopped
    from safetensors.torch import load

    assert int(load(whole)["moe.affinity.live"].sum()) > 3, "rows without an expert brought new ones"


def test_what_is_refused() -> None:
    with pytest.raises(BadInput, match="5 of 4 experts at first"):
        Thresholds(6, 4, first=5)
    with pytest.raises(BadInput, match="9 of 3 steps"):
        ExpertTurnover(9, 3)
