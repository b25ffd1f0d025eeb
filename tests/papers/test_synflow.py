"""SynFlow: conserved per layer and per unit, no layer emptied at extreme densities, no data."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.records import Phase, TrainRecipe
from rarefy.weights.allocations.global_scores import Global
from rarefy.weights.criteria.snip import SNIP
from rarefy.weights.criteria.synflow import SYNFLOW, Synflow, rounds
from tests.evidence import check
from tests.papers.at_start import DIGITS, batches, begun, measured

CONSERVED = "the scores of every layer add up to the same flow, and at every hidden unit what comes in goes out"
COLLAPSE = "at the density of one weight a unit no layer is empty and signals pass, in a hundred rounds"


def bare(depth: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(m for i in range(depth) for m in (nn.Linear(12 if i else 10, 12, bias=False), nn.ReLU())))


def conserved_holds(score: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]) -> None:
    model = bare()
    scores = score(model, measured("synaptic_flow", model, [torch.randn(3, 10)]))
    layers = list(scores.values())
    x = torch.ones(10)
    for weight in (m.weight.detach() for m in model if isinstance(m, nn.Linear)):
        x = weight.abs() @ x  # the flow by hand: moduli and ones
    for layer in layers:
        assert torch.allclose(layer.sum(), x.sum(), rtol=1e-4)
    for before, after in itertools.pairwise(layers):
        assert torch.allclose(before.sum(1), after.sum(0), rtol=1e-4)


def by_moduli(model: nn.Module, flow: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: Synflow().scores(model.get_parameter(name), synaptic_flow=value) for name, value in flow.items()}


def signed(model: nn.Module, flow: dict[str, Tensor]) -> dict[str, Tensor]:
    """The twin: the gradient of the sum of outputs as the network is, without moduli."""
    gradients = measured("gradient", model, [torch.ones(1, 10)], lambda m, b: m(b).sum())
    return {name: (model.get_parameter(name).detach() * g).abs() for name, g in gradients.items()}


@check("synflow", CONSERVED, kind="method")
def test_flow_is_conserved() -> None:
    conserved_holds(by_moduli)


@check("synflow", CONSERVED, kind="twin")
def test_signed_flow_is_not() -> None:
    with pytest.raises(AssertionError):
        conserved_holds(signed)


def _once(density: float, steps: int) -> tuple[Phase, ...]:
    """The twin: all in one round."""
    return (*rounds(density, 1), Phase("train"))


ONCE = TrainRecipe("once", _once, Global(), Synflow())


def collapse_holds(recipe: TrainRecipe) -> None:
    """Five layers of unequal width, biases not zero, and 30 of 14,560 weights: what is left still joins input and output."""
    torch.manual_seed(0)
    widths = (64, 90, 60, 40, 20, 10)
    model = nn.Sequential(*(m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())))
    total = sum(a * b for a, b in itertools.pairwise(widths))
    counts = begun(recipe, 30 / total, model).support.counts()
    assert sum(counts.values()) == 30
    assert min(counts.values()) >= 1, counts
    moduli = {name: p.abs() for name, p in model.named_parameters() if p.dim() == 2}
    x = torch.ones(64)
    for weight in moduli.values():
        x = weight @ x
    assert float(x.detach().sum()) > 0, counts


@check("synflow", COLLAPSE, kind="method")
def test_no_layer_collapses() -> None:
    pytest.importorskip("sklearn")
    collapse_holds(SYNFLOW)


@check("synflow", COLLAPSE, kind="twin")
@pytest.mark.parametrize("recipe", [ONCE, SNIP], ids=["one round", "snip"])
def test_one_round_collapses(recipe: TrainRecipe) -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(AssertionError):
        collapse_holds(recipe)


def test_the_data_do_not_matter_and_masks_are_nested() -> None:
    pytest.importorskip("sklearn")
    first, other = (begun(SYNFLOW, 0.1, DIGITS.model(0), given) for given in (batches(1), [(torch.randn(7, 64), torch.zeros(7))]))
    assert all(torch.equal(first.support.masks[key], other.support.masks[key]) for key in first.weights)
    counts = [sum(event.data["nnz"].values()) for event in first.ledger if event.kind == "mask"]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 883
    weights = {key: w.detach() for key, w in first.weights.items()}
    assert all(torch.equal(w != 0, first.support.masks[key]) for key, w in weights.items())


def test_token_ids_have_no_flow() -> None:
    from rarefy.core.errors import BadInput

    with pytest.raises(BadInput, match="ones in place of real inputs"):
        measured("synaptic_flow", bare(), [torch.ones(2, 10, dtype=torch.long)])
