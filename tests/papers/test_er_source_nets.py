"""Random source networks: nothing leaves the first support, layer ratios solve their budgets, and a dense enough source loses nothing.

Measured here: digits, iterative magnitude pruning to 5%, see replications/er_source_digits.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
import torch

from rarefy.core.errors import BadInput
from rarefy.core.records import Phase, Units
from rarefy.weights.allocations.balanced import Balanced
from rarefy.weights.allocations.pyramidal import Pyramidal, falling_factor
from rarefy.weights.rewind import IMP
from rarefy.weights.rewiring.rigl import RIGL
from rarefy.weights.rewiring.set import SET_RECIPE
from rarefy.weights.schedules.cubic import GRADUAL_MAGNITUDE
from rarefy.weights.source_net import ER_SOURCE, SourceNet, copies
from rarefy.weights.sparsifier import Sparsifier
from rarefy.weights.train import train
from tests.evidence import check
from tests.papers.at_start import DIGITS
from tests.test_cli import run

STAYS = "after every pruning and every regrowth the mask is a part of the source's, and its weights are zero outside"
RATIOS = "pyramidal ratios solve their budget to 1e-6, balanced layers keep the same count, both exact"
Before = Callable[[SourceNet, float], tuple[Phase, ...]]


def stays_inside(before: Before) -> None:
    for recipe in (IMP, RIGL, SET_RECIPE, GRADUAL_MAGNITUDE):
        model = DIGITS.model(0)
        phases = (*before(SourceNet(0.3), 0.1), *recipe.phases(0.1, 40))
        sp = Sparsifier(model, phases, total=40)
        source = {key: mask.clone() for key, mask in first_masks(SourceNet(0.3)).items()}
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
        sp.attach(optimizer)
        for step in range(40):
            optimizer.zero_grad()
            sp.loss(DIGITS.loss(model, DIGITS.batch(0, step))).backward()
            optimizer.step()
            for key, mask in sp.support.masks.items():
                assert not bool((mask & ~source[key]).any()), f"{recipe.name} leaves the source at step {step}"
                assert not bool(model.get_parameter(key)[~source[key]].any() if recipe is not GRADUAL_MAGNITUDE else sp.weights[key][~source[key]].any())


def first_masks(source: SourceNet) -> dict[str, torch.Tensor]:
    return Sparsifier(DIGITS.model(0), (*source.before(0.0), Phase()), total=1).support.masks


def unbounded(source: SourceNet, density: float) -> tuple[Phase, ...]:
    """The twin: draws the source and forgets it as soon as something regrows."""
    return source.before(density)[:1]


@check("er-source-nets", STAYS, kind="method")
def test_nothing_leaves_the_source() -> None:
    pytest.importorskip("sklearn")
    stays_inside(SourceNet.before)


@check("er-source-nets", STAYS, kind="twin")
def test_an_unbounded_regrowth_leaves_it() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(AssertionError, match="leaves the source"):
        stays_inside(unbounded)


UNITS = (Units("a", (20, 30), ()), Units("b", (100, 20), ()), Units("c", (10, 4), ()))


def ratios_hold(pyramidal: Callable[[Sequence[Units], int], dict[str, int]], balanced: Callable[[Sequence[Units], int], dict[str, int]]) -> None:
    sizes = [u.numel for u in UNITS]
    for budget in (40, 300, 1320, 2600):
        r = falling_factor(sizes, budget)
        assert abs(r * sizes[0] + r**2 * sizes[1] + r**3 * sizes[2] - budget) < 1e-6
        counts = pyramidal(UNITS, budget)
        assert sum(counts.values()) == budget
        assert all(abs(counts[u.name] - u.numel * r ** (i + 1)) < 1 for i, u in enumerate(UNITS))
    assert balanced(UNITS, 300) == {"a": 130, "b": 130, "c": 40}
    assert balanced(UNITS, 1500) == {"a": 600, "b": 860, "c": 40}


def clipped(units: Sequence[Units], budget: int) -> dict[str, int]:
    """The twin: what a small layer cannot take is lost, and counts are expected ones."""
    return {u.name: min(u.numel, budget // len(units)) for u in units}


@check("er-source-nets", RATIOS, kind="method")
def test_ratios() -> None:
    ratios_hold(Pyramidal().counts, Balanced().counts)


@check("er-source-nets", RATIOS, kind="twin")
def test_clipped_ratios() -> None:
    with pytest.raises(AssertionError):
        ratios_hold(Pyramidal().counts, clipped)


@check("er-source-nets", "parallel edges are there as often as the width rule says, in drawn sources", kind="method")
def test_width_rule() -> None:
    for density, failure in ((0.5, 0.1), (0.2, 0.3)):
        parallel = copies(density, failure)
        assert abs((1 - density) ** parallel - failure) < 1e-12
        whole = int(parallel)
        masks = [first_masks_of_row(density, seed) for seed in range(4)]
        groups = torch.cat([m[: len(m) // whole * whole].view(-1, whole) for m in masks])
        assert abs(float(groups.any(1).float().mean()) - (1 - (1 - density) ** whole)) < 0.02


def first_masks_of_row(density: float, seed: int) -> torch.Tensor:
    model = torch.nn.Linear(128, 64)
    return Sparsifier(model, (*SourceNet(density, Balanced()).before(0.0), Phase()), total=1, seed=seed).support.masks["weight"].flatten()


def test_a_user_reaches_it(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    code, out, err = run(capsys, "train", "digits", "--recipe", "rigl", "--within", "balanced:0.3", "--density", "0.1", "--steps", "20", "--json")
    assert code == 0, err
    assert json.loads(out)["within"] == "SourceNet(density=0.3, allocation=Balanced())"
    assert train(DIGITS, ER_SOURCE, density=0.2, steps=40)["density"] == pytest.approx(0.2, abs=1e-4)
    with pytest.raises(BadInput, match="a part of the source"):
        train(DIGITS, IMP, density=0.4, steps=40, within=SourceNet(0.3))
    with pytest.raises(BadInput, match="write for example"):
        SourceNet.parse("half")


def test_a_resumed_run_is_still_confined(tmp_path: object) -> None:
    model = DIGITS.model(0)
    sp = Sparsifier(model, (*SourceNet(0.3).before(0.1), *RIGL.phases(0.1, 40)), total=40)
    other = Sparsifier(DIGITS.model(0), (*SourceNet(0.3).before(0.1), *RIGL.phases(0.1, 40)), total=40, seed=5)
    other.load_state_dict(sp.state_dict())
    assert all(torch.equal(other.support.outer[key], mask) for key, mask in sp.support.outer.items())
