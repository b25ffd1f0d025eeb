"""CATS: the units that the activation function returns, and the work behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.activations.apply import apply_gating
from rarefy.activations.gates.threshold import Threshold
from rarefy.activations.gatings.cats import CATS
from rarefy.activations.ledger import measure
from rarefy.activations.watch import mlps
from rarefy.core.attach import gated
from rarefy.core.records import Gating
from rarefy.core.roles import Places
from tests.evidence import check
from tests.papers.blocks import UNITS, WIDTH, Mlp, chain, tokens

NAME = "half of the units are zero on held-out tokens, a third of the MLP's work with them, at less error than random halves"
SEEN, HELD = tokens(1), tokens(2)


def gathered(mlp: Mlp, x: Tensor, threshold: float) -> Tensor:
    """One token [WIDTH] with the active rows of `up` and columns of `down` only."""
    a = F.silu(F.linear(x, mlp.gate.weight, mlp.gate.bias))
    on = a.abs() >= threshold
    return F.linear(a[on] * F.linear(x, mlp.up.weight[on], mlp.up.bias[on]), mlp.down.weight[:, on], mlp.down.bias)


@torch.no_grad()
def holds(gating: Gating) -> None:
    open_, dense, model, x = chain(), chain(), chain(), HELD[0]
    apply_gating(open_, replace(gating, density=1.0), SEEN, HELD)
    assert torch.equal(open_(x), dense(x)), "density 1 is the dense model"
    assert all(abs(g["density"] - 0.2) < 0.02 for g in apply_gating(chain(), replace(gating, density=0.2), SEEN, HELD)["gates"])
    record = apply_gating(model, replace(gating, density=0.5), SEEN, HELD)
    assert all(abs(g["density"] - 0.5) < 0.02 for g in record["gates"]) and len(record["gates"]) == 2
    mlp = model.blocks[0].mlp
    work = {r["name"]: r["macs_executed"] for r in record["ledger"]["matrices"] if r["name"].startswith("blocks.0.mlp.")}
    zero = 1 - record["gates"][0]["density"]
    assert sum(work.values()) == pytest.approx(3 * WIDTH * UNITS * (1 - 2 / 3 * zero)), "two thirds of what a zero unit costs is spared"
    gate = next(iter(gated(model).values()))
    torch.testing.assert_close(mlp(x)[0, 5], gathered(mlp, x[0, 5], gate.settings()["threshold"]), rtol=1e-5, atol=1e-5)
    noise = [_random_half(dense.blocks[0].mlp, x, seed) for seed in range(3)]
    y = dense.blocks[0].mlp(x)
    assert (mlp(x) - y).norm() < 0.5 * min(float((n - y).norm()) for n in noise)


def _random_half(mlp: Mlp, x: Tensor, seed: int) -> Tensor:
    on = torch.rand(*x.shape[:-1], UNITS, generator=torch.Generator().manual_seed(seed)) < 0.5
    found: Tensor = mlp.down(mlp.act(mlp.gate(x)) * on * mlp.up(x))
    return found


class Products(Places):
    """The products a * u, behind `up`."""

    def find(self, model: Any, batch: Any) -> tuple[str, ...]:
        return tuple(m.reads for m in mlps(model, batch))


class Uncalibrated(Threshold):
    """The quantile of a normal distribution."""

    def calibrate(self, rows: Tensor) -> None:
        self.threshold.fill_(0.674 if self.density < 1 else 0.0)


@check("cats", NAME, kind="method")
def test_cats() -> None:
    holds(CATS)


@check("cats", NAME, kind="twin")
@pytest.mark.parametrize(
    "twin",
    [lambda: replace(CATS, parts=((Products(), Threshold),)), lambda: replace(CATS, parts=((CATS.parts[0][0], Uncalibrated),))],
    ids=["behind up", "not calibrated"],
)
def test_behind_up_or_without_calibration_it_fails(twin: Callable[[], Gating]) -> None:
    with pytest.raises(AssertionError):
        holds(twin())


@torch.no_grad()
def test_the_ledger_counts_what_a_loop_over_tokens_does() -> None:
    model, x = chain(1), tokens(3, 1)[0][:1, :9]
    apply_gating(model, replace(CATS, density=0.3), SEEN, HELD)
    found = measure(model, [x])
    seen: dict[str, Tensor] = {}
    mlp = model.blocks[0].mlp
    hooks = [mlp.act.register_forward_hook(lambda _, __, y: seen.update(a=y)), mlp.down.register_forward_pre_hook(lambda _, args: seen.update(h=args[0]))]
    model(x)
    for hook in hooks:
        hook.remove()
    assert found.matrices["blocks.0.mlp.up"].executed == sum(int((a != 0).sum()) * WIDTH for a in seen["a"][0])
    assert found.matrices["blocks.0.mlp.down"].executed == sum(int((h != 0).sum()) * WIDTH for h in seen["h"][0])
    assert found.matrices["blocks.0.mlp.gate"].executed == 9 * WIDTH * UNITS == found.matrices["blocks.0.mlp.gate"].dense
    record = found.record()
    assert record["macs"] == 3 * WIDTH * UNITS + WIDTH * (WIDTH + 8 + 8) + 8 * WIDTH and record["tokens"] == 9
