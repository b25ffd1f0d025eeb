"""SRigL: one fan-in for all active neurons, which neurons go, a budget that does not drift, and the condensed form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from rarefy.core.exact import keep_count, topk_mask_rows
from rarefy.core.records import Delta, Entries, Phase, TrainRecipe
from rarefy.layouts.condensed import Condensed
from rarefy.tasks.digits import Digits
from rarefy.weights.rewiring.rigl import RIGL
from rarefy.weights.rewiring.srigl import SRIGL, SRigL
from rarefy.weights.sparsifier import Sparsifier
from rarefy.weights.train import train
from tests.evidence import check
from tests.papers.at_start import DIGITS

HAND = "which neurons stay, their fan-in, what each drops and grows: as sorted by hand, at every gamma and in the last layer"
FAN_IN = "after every update all active rows have one fan-in, and the budget is met up to fewer weights than there are of them"
Rewire = Callable[..., Delta]


def by_hand(weight: Tensor, mask: Tensor, gradient: Tensor, count: int, fraction: float, gamma: float, final: bool) -> set[tuple[int, int]]:
    """The new support as pairs (neuron, input), by sorting lists."""
    rows, columns = weight.shape
    everywhere = [(r, c) for r in range(rows) for c in range(columns)]
    stored = sorted((p for p in everywhere if mask[p]), key=lambda p: -abs(float(weight[p])))
    grow = int(fraction * len(stored))
    best, steep = stored[: len(stored) - grow], sorted(everywhere, key=lambda p: -abs(float(gradient[p])))
    salient = Counter(r for r, _ in {*best, *steep[:grow]})
    ranked = sorted((salient[r] for r in range(rows)), reverse=True)
    wanted = min(0 if final else max(1, int(gamma * (count // rows))), ranked[-(-count // columns) - 1])
    active = [r for r in range(rows) if salient[r] >= wanted]
    fan_in, new = count // len(active), set()
    alive = [p for p in stored if p[0] in active][: len(best)]
    for r in active:
        kept = [p for p in alive if p[0] == r][:fan_in]
        new |= {*kept, *[p for p in steep if p[0] == r and p not in kept][: fan_in - len(kept)]}
    return new


def hand_holds(rewire: Callable[[float], Rewire]) -> None:
    ablated = 0
    for seed in range(6):
        g = Generator().manual_seed(seed)
        weight, gradient = (torch.randn(8, 10, generator=g) * torch.logspace(-2, 0, 8)[torch.randperm(8, generator=g)][:, None] for _ in range(2))
        mask = topk_mask_rows(torch.rand(8, 10, generator=g), 4)
        entries = Entries(weight[mask], mask.flatten().nonzero()[:, 0], (8, 10))
        for gamma in (0.3, 0.6, 0.95):
            for final in (False, True):
                delta = rewire(gamma)(entries, count=32, fraction=0.3, bound=None, generator=g, gradient=gradient, final=final)
                after = mask.clone().flatten()
                after[delta.drop], after[delta.grow] = False, True
                found = {(int(i) // 10, int(i) % 10) for i in after.nonzero()}
                assert found == by_hand(weight, mask, gradient, 32, 0.3, gamma, final)
                ablated += 8 - len({r for r, _ in found})
    assert ablated > 6


def masked_gradient(gamma: float) -> Rewire:
    """The twin: looks at the gradient after the mask, so that what is not stored is never salient."""

    def rewire(entries: Entries, *, gradient: Tensor, **asked: Any) -> Delta:
        seen = torch.zeros_like(gradient).flatten()
        seen[entries.index] = gradient.flatten()[entries.index]
        return SRigL(gamma).rewire(entries, gradient=seen.view_as(gradient), **asked)

    return rewire


@check("srigl", HAND, kind="method")
def test_by_hand() -> None:
    hand_holds(lambda gamma: SRigL(gamma).rewire)


@check("srigl", HAND, kind="twin")
def test_a_masked_gradient() -> None:
    with pytest.raises(AssertionError):
        hand_holds(masked_gradient)


def fan_in_holds(recipe: TrainRecipe, density: float = 0.05) -> None:
    """64 updates on digits, at every one the rows counted; the last layer loses no neuron."""
    model = DIGITS.model(0)
    phases = tuple(replace(p, allocation=recipe.allocation, every=2) for p in recipe.phases(density, 80))
    sp = Sparsifier(model, phases, total=80)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sp.attach(optimizer)
    asked = sp.phase.allocation.counts(sp.support.units(), keep_count(8832, density))
    for step in range(80):
        optimizer.zero_grad()
        sp.loss(DIGITS.loss(model, DIGITS.batch(0, step))).backward()
        optimizer.step()
        if step > 2:
            for key, mask in sp.support.masks.items():
                fan_in = mask.sum(1)[mask.any(1)]
                assert int(fan_in.min()) == int(fan_in.max()), key
                assert 0 <= asked[key] - int(mask.sum()) < len(fan_in), key
                assert not bool(model.get_parameter(key)[~mask].any())
            assert len(fan_in) == 10, "the last layer lost a neuron"
    assert any(not bool(mask.any(1).all()) for mask in sp.support.masks.values()), "no neuron was ablated"


class KeepsFanIn(SRigL):
    """The twin: neurons go, and the fan-in of those that stay does not rise."""

    name = "keeps-fan-in"

    def rewire(self, entries: Entries, *, count: int, gradient: Tensor, final: bool, **asked: Any) -> Delta:
        rows = entries.index // (torch.Size(entries.shape).numel() // entries.shape[0])
        return super().rewire(entries, count=int(count * len(rows.unique()) / entries.shape[0]), gradient=gradient, final=final, **asked)


def _kept_fan_in(density: float, steps: int) -> tuple[Phase, ...]:
    draw, train = SRIGL.phases(density, steps)
    return draw, replace(train, rewiring=KeepsFanIn())


@check("srigl", FAN_IN, kind="method")
def test_one_fan_in() -> None:
    pytest.importorskip("sklearn")
    fan_in_holds(SRIGL)


@check("srigl", FAN_IN, kind="twin")
@pytest.mark.parametrize("recipe", [RIGL, replace(SRIGL, phases=_kept_fan_in)], ids=["rigl", "fan-in kept"])
def test_without_a_new_fan_in(recipe: TrainRecipe) -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(AssertionError):
        fan_in_holds(recipe)


ABLATION = "at 99% on digits, 256 wide, letting neurons go is worth accuracy, and a larger gamma lets more of them go"


class Spares(SRigL):
    """The twin: no neuron is ablated; every layer is treated as the last."""

    name = "spares"

    def rewire(self, entries: Entries, *, gradient: Tensor, final: bool, **asked: Any) -> Delta:
        return super().rewire(entries, gradient=gradient, final=True, **asked)


def with_rewiring(rewiring: SRigL) -> TrainRecipe:
    def phases(density: float, steps: int) -> tuple[Phase, ...]:
        draw, trained = SRIGL.phases(density, steps)
        return draw, replace(trained, rewiring=rewiring)

    return replace(SRIGL, phases=phases)


def accuracy(rewiring: SRigL) -> float:
    runs = [train(Digits(width=256), with_rewiring(rewiring), density=0.01, steps=300, seed=seed) for seed in range(2)]
    return sum(run["metric"]["accuracy"] for run in runs) / len(runs)


def active_neurons(kind: type[SRigL], gamma: float) -> int:
    """Of two layers of 64 trained at a tenth; fan-ins of 5 and 6, so that 0.3, 0.6 and 0.95 of them differ."""
    model = DIGITS.model(0)
    phases = tuple(replace(p, allocation=SRIGL.allocation, every=5) for p in with_rewiring(kind(gamma)).phases(0.1, 60))
    sp = Sparsifier(model, phases, total=60).attach(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    for step in range(60):
        model.zero_grad()
        sp.loss(DIGITS.loss(model, DIGITS.batch(0, step))).backward()
        sp.optimizer.step()
    return sum(int(mask.any(1).sum()) for mask in sp.support.masks.values())


def ablation_holds(kind: type[SRigL]) -> None:
    active = [active_neurons(kind, gamma) for gamma in (0.3, 0.6, 0.95)]
    assert active[0] > active[1] > active[2], active
    found, spared = accuracy(kind()), accuracy(Spares())
    assert found > spared, (found, spared)


@check("srigl", ABLATION, kind="method")
def test_ablation() -> None:
    """Seen here, means of seeds 0 and 1 after 300 steps: 0.900 with neurons that go, 0.858 without; 136, 122 and 103 active of 138."""
    pytest.importorskip("sklearn")
    ablation_holds(SRigL)


@check("srigl", ABLATION, kind="twin")
def test_without_ablation() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(AssertionError):
        ablation_holds(Spares)


@check("srigl", "the condensed form computes what the masked matrix does, ablated rows among them", kind="method")
def test_condensed() -> None:
    g = Generator().manual_seed(0)
    weight, gradient = torch.randn(12, 30, generator=g), torch.randn(12, 30, generator=g) * torch.logspace(-3, 0, 12)[:, None]
    weight = weight * torch.logspace(-3, 0, 12)[:, None]
    mask = topk_mask_rows(weight.abs(), 5)
    delta = SRigL(0.6).rewire(Entries(weight[mask], mask.flatten().nonzero()[:, 0], (12, 30)), count=60, fraction=0.3, bound=None, generator=None, gradient=gradient, final=False)
    mask.view(-1)[delta.drop], mask.view(-1)[delta.grow] = False, True
    assert not bool(mask.any(1).all())
    masked, x, bias = weight * mask, torch.randn(7, 30, generator=g), torch.randn(12, generator=g)
    packed = Condensed().pack(masked)
    assert (Condensed().matrix(packed, (12, 30), torch.float32).linear(x, bias) - torch.nn.functional.linear(x, masked, bias)).abs().max() < 1e-6
