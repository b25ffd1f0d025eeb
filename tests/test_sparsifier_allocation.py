"""Allocations while training: each recipe's own is used, another may take its place, and axes are the layers' own."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from rarefy.cli.main import main
from rarefy.core.discover import train_recipes
from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Phase, Units
from rarefy.tasks.digits import Digits
from rarefy.weights.allocations.erdos_renyi import ER, ERK
from rarefy.weights.allocations.global_scores import Global
from rarefy.weights.allocations.uniform import Uniform
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.criteria.wanda import Wanda
from rarefy.weights.patterns.n_m import NM
from rarefy.weights.rewiring.rigl import RIGL
from rarefy.weights.schedules.constant import Constant
from rarefy.weights.schedules.static import STATIC
from rarefy.weights.sparsifier import Sparsifier
from rarefy.weights.train import train

OWN = {"pst": Uniform, "rigl": ERK, "set": ER, "static": ERK, "gradual-magnitude": Uniform, "iss-p": Uniform}
RATED = dict.fromkeys(("snip", "grasp", "synflow", "imp", "imp-rate", "er-source-nets"), Global) | {"srigl": ERK}
RATED |= dict.fromkeys(("sparse-model-soups", "swamp", "ac-dc", "gradual-restarts", "hypersparse"), Global)
ARRIVING = {"app-anytime": Global}  # waits for data, which a task of digits does not bring
STEPS = {"swamp": 480}  # 24 for the others


def test_every_recipe_states_its_papers_allocation() -> None:
    assert {name: type(recipe.allocation) for name, recipe in train_recipes().items()} == OWN | RATED | ARRIVING


@pytest.mark.parametrize("name", RATED)
def test_a_given_allocation_splits_what_a_criterion_rates(name: str) -> None:
    pytest.importorskip("sklearn")
    record = train(Digits(width=16, rows=8), train_recipes()[name], density=0.3, steps=STEPS.get(name, 24), allocation=Uniform())
    expected = Uniform().counts([Units(s["key"], tuple(s["shape"]), ()) for s in record["sites"]], round(0.3 * 1440))
    assert all(s["nnz"] <= expected[s["key"]] for s in record["sites"])
    assert sum(s["nnz"] for s in record["sites"]) > (0.6 if name == "srigl" else 0.999) * sum(expected.values())


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("given", [None, Uniform(), ER()], ids=repr)
def test_training_uses_the_recipes_allocation_or_the_given_one(name: str, given: object) -> None:
    pytest.importorskip("sklearn")
    recipe, task = train_recipes()[name], Digits(width=16, rows=8)
    record = train(task, recipe, density=0.3, steps=8, allocation=given)
    expected = (given or recipe.allocation).counts([Units(s["key"], tuple(s["shape"]), ()) for s in record["sites"]], round(0.3 * 1440))
    assert record["allocation"] == repr(given or recipe.allocation)
    for site in record["sites"]:
        # A weight that was just grown is zero still, so RigL and SET may hold fewer than they may.
        assert site["nnz"] <= expected[site["key"]]
    assert sum(s["nnz"] for s in record["sites"]) > 0.8 * sum(expected.values())
    if name in ("static", "gradual-magnitude"):
        assert {s["key"]: s["nnz"] for s in record["sites"]} == expected


def test_a_checkpoint_under_another_allocation_is_refused(tmp_path) -> None:
    pytest.importorskip("sklearn")
    train(Digits(width=8, rows=4), RIGL, density=0.5, steps=2, checkpoint_dir=tmp_path)
    with pytest.raises(Refused, match="Uniform"):
        train(Digits(width=8, rows=4), RIGL, density=0.5, steps=2, checkpoint_dir=tmp_path, allocation=Uniform())


def test_the_command_line_names_an_allocation(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    arguments = ["train", "digits", "--recipe", "static", "--density", "0.3", "--steps", "1", "--json"]
    found = []
    for more in ([], ["--allocation", "erk"], ["--allocation", "uniform"]):
        assert main([*arguments, *more]) == 0
        found.append([s["nnz"] for s in json.loads(capsys.readouterr().out)["sites"]])
    assert found[0] == found[1] != found[2]
    assert main([*arguments, "--allocation", "none-such"]) == 2
    assert "allocation 'none-such': known are" in capsys.readouterr().err


def test_a_convolution_is_counted_and_masked_in_its_own_axes() -> None:
    """A Conv2d of 8 outputs and 4 inputs: ER weighs it 12 / 32 of its 288 weights, 108; the head 18 / 80 of 80, 18."""
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3), "head": nn.Linear(8, 10)})
    sp = Sparsifier(model, Phase(density=Constant(63 / 368), criterion=Magnitude(), allocation=ER()))
    assert sp.support.counts() == {"conv.weight": 54, "head.weight": 9}
    half = Sparsifier(model, Phase(density=Constant(0.5), criterion=Magnitude(), pattern=NM(2, 4)))
    assert (half.support.masks["conv.weight"].sum(1) == 2).all()
    assert torch.equal(model["conv"].weight != 0, half.support.masks["conv.weight"] & sp.support.masks["conv.weight"])


def test_an_allocation_that_asks_for_scores_gets_the_criterions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    with torch.no_grad():
        model[1].weight.mul_(10)
    best = torch.cat([p.abs().flatten() for p in (model[0].weight, model[1].weight)]).sort(descending=True).values[:20].min()
    expected = {f"{i}.weight": int((model[i].weight.abs() >= best).sum()) for i in range(2)}
    phase = Phase(density=Constant(0.4), criterion=Magnitude(), allocation=Global())
    assert Sparsifier(model, phase).support.counts() == expected
    with pytest.raises(BadInput, match="needs the phase's criterion"):
        from rarefy.weights.rewiring.set import SET

        sp = Sparsifier(model, Phase(density=Constant(0.4), allocation=Global(), rewiring=SET(), every=1))
        sp.progress = sp.progress.__class__(phase_step=1)
        sp._rewire()


def test_what_training_does_not_collect_is_refused_in_one_sentence() -> None:
    with pytest.raises(BadInput, match="asks for input_norm, which training does not collect"):
        Sparsifier(nn.Linear(4, 4), Phase(density=Constant(0.5), criterion=Wanda()))


def test_a_pattern_that_misses_the_count_does_not_choose_anew_at_every_step() -> None:
    model = nn.Linear(8, 4, bias=False)
    sp = Sparsifier(model, Phase(density=Constant(0.45), criterion=Magnitude(), pattern=NM(2, 4), enforce=False), total=5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sp.attach(optimizer)
    for _ in range(3):
        model(torch.randn(2, 8)).sum().backward()
        optimizer.step()
    assert [event.kind for event in sp.ledger] == ["mask"]


def test_the_record_says_what_was_asked() -> None:
    pytest.importorskip("sklearn")
    assert train(Digits(width=8, rows=4), STATIC, density=0.5, steps=1)["allocation"] == "ERK()"
