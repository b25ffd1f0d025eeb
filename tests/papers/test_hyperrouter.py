"""HyperRouter: d learned numbers a layer, a frozen network that makes the router of them, and k that grows."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.control import Control
from rarefy.core.records import Context, Scores
from rarefy.core.trace import Trace
from rarefy.experts.active import set_active
from rarefy.experts.banks.glu import GLU
from rarefy.experts.moe import MoE
from rarefy.experts.routers.frozen import GrowingTopK
from rarefy.experts.routers.generated import Generated, GeneratedTopK
from rarefy.experts.routing import dense, per_row
from rarefy.tasks.char_lm import CharLM
from tests.evidence import check

SLUG = "hyperrouter"
WIDTH, EXPERTS, HIDDEN = 6, 4, 12


def generated(choice: GeneratedTopK) -> None:
    """Two layers of which d numbers each learn: the network keeps its bits, W moves, and only along what the network makes; k is as scheduled."""
    torch.manual_seed(0)
    model = nn.Sequential(*(MoE(choice.affinity(WIDTH, EXPERTS), choice, GLU(EXPERTS, WIDTH, 5)) for _ in range(2)))
    routers: list[Any] = [layer.affinity for layer in model]
    assert sum(p.numel() for p in {id(p): p for r in routers for p in r.parameters()}.values()) == 2 * WIDTH
    first = [[t.detach().clone() for t in r.made()] for r in routers]
    assert not torch.allclose(first[0][0], first[1][0]), "both layers have one router"
    frozen = {k: v.clone() for k, v in model.state_dict().items() if "hidden" in k or "out_" in k}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    control, x, served = Control(model, optimizer, choice.controllers), torch.randn(12, WIDTH), []
    for _ in range(5):
        optimizer.zero_grad()
        with Trace(model) as trace:
            y = model(x)
        served.append({int(n) for entry in trace.entries for n in per_row(entry.routing)})
        control.loss(y.square().sum()).backward()
        optimizer.step()
    assert served == [{2}, {3}, {3}, {4}, {4}]
    assert len(frozen) == 8 and all(torch.equal(model.state_dict()[k], v) for k, v in frozen.items()), "the network moved"
    for router, (weight, bias) in zip(routers, first, strict=True):
        moved = torch.cat([router.made()[0] - weight, (router.made()[1] - bias)[:, None]], 1).detach().flatten().double()
        assert moved.norm() > 0.1, "W does not move"
        image = router.out_weight.double()
        along = image @ torch.linalg.lstsq(image, moved[:, None]).solution
        assert image.shape == (EXPERTS * (WIDTH + 1), HIDDEN)
        torch.testing.assert_close(along[:, 0], moved, atol=1e-5, rtol=1e-4)


class Held(Generated):
    """Made anew in every forward, and detached: a frozen router."""

    def made(self) -> tuple[Tensor, Tensor]:
        weight, bias = super().made()
        return weight.detach() + 0.0 * self.embedding.sum(), bias.detach()


class Trains(Generated):
    """The network learns too."""

    def __init__(self, width: int, experts: int, *, hidden: int = 256) -> None:
        super().__init__(width, experts, hidden=hidden)
        for name in ("hidden_weight", "out_weight"):
            value = self._buffers.pop(name)
            self.register_parameter(name, nn.Parameter(value))  # type: ignore[arg-type]


class HeldTopK(GeneratedTopK):
    def affinity(self, width: int, experts: int, /) -> Any:
        return Held(width, experts, hidden=self.hidden)


class TrainsTopK(GeneratedTopK):
    def affinity(self, width: int, experts: int, /) -> Any:
        return Trains(width, experts, hidden=self.hidden)


ONE = Generated(WIDTH, EXPERTS, hidden=HIDDEN)


class OneForAll(GeneratedTopK):
    """One embedding and network for all layers."""

    def affinity(self, width: int, experts: int, /) -> Any:
        return ONE


class NoSchedule(GeneratedTopK):
    controllers = ()  # type: ignore[assignment]


GENERATED = "d numbers a layer learn, the network keeps its bits, and W moves within its image while k grows"


@check(SLUG, GENERATED, kind="method")
def test_generated() -> None:
    generated(GeneratedTopK(over=3, hidden=HIDDEN))


@check(SLUG, GENERATED, kind="twin")
@pytest.mark.parametrize("twin", [HeldTopK, TrainsTopK, OneForAll, NoSchedule])
def test_generated_twins(twin: type[GeneratedTopK]) -> None:
    with pytest.raises(AssertionError):
        generated(twin(over=3, hidden=HIDDEN))


@cache
def trained(choice: GeneratedTopK | GrowingTopK, seed: int) -> dict[int, float]:
    """Held-out loss with k of 16 experts after 300 steps on text."""
    task = CharLM(width=32, experts=16, inner=8, rows=64)
    model: Any = task.model(seed, router=f"{choice.name}:over=300")
    if isinstance(choice, HeldTopK):
        model.moe.affinity.__class__ = Held
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    control = Control(model, optimizer, model.controllers)
    for step in range(300):
        optimizer.zero_grad()
        control.loss(task.loss(model, task.batch(seed, step))).backward()
        optimizer.step()
    control.close()
    return {k: task.evaluate(set_active(model, k))["loss"] for k in (2, 16)}


@check(SLUG, "on text, trained with k growing, its loss at k = 2 is below that of a frozen linear router", kind="method")
def test_few_experts() -> None:
    """At k = 2, seeds 0, 1: 2.397, 2.387 against 2.613, 2.612 of a frozen linear router; at k = 16 2.329, 2.363 against 2.343, 2.347.

    It is not what was learned: with its vector held, the loss at k = 2 is 2.396, 2.388 (seed 2: 2.417, learned 2.416), and at learning rates
    of 0.005 and 0.01, or with k from 1 or 2, learning helps as often as it hurts. What the network makes has larger logits than torch's
    linear layer. The paper's runs are a thousand times longer.
    """
    found, plain = trained(GeneratedTopK(), 0), trained(GrowingTopK(), 0)
    assert found[2] < plain[2] - 0.1 and found[16] < plain[16] + 0.02
    held = trained(HeldTopK(), 0)
    assert abs(held[2] - found[2]) < 0.02, "learning the vector now matters: say so here and among the deviations"


def test_it_chooses_by_what_it_made_and_a_copy_makes_the_same() -> None:
    torch.manual_seed(0)
    router, x = Generated(WIDTH, EXPERTS, hidden=HIDDEN), torch.randn(9, WIDTH)
    inner = (router.hidden_weight @ router.embedding + router.hidden_bias).relu()
    rows = (router.out_weight @ inner + router.out_bias).view(EXPERTS, WIDTH + 1)
    logits = x @ rows[:, :-1].T + rows[:, -1]
    torch.testing.assert_close(router(x, Context(), None).logits, logits)
    want, got = (torch.autograd.grad(z.square().sum(), router.embedding)[0] for z in (logits, router(x, Context(), None).logits))
    torch.testing.assert_close(got, want)
    other = Generated(WIDTH, EXPERTS, hidden=HIDDEN)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(x, Context(), None).logits, router(x, Context(), None).logits)
    value, index = logits.topk(2)
    want = torch.zeros_like(logits).scatter(1, index, value.softmax(-1))
    torch.testing.assert_close(dense(GeneratedTopK(2)(Scores(logits), Context())), want)
