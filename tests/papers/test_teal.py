"""TEAL: the asked density weighted by cost, reached on tokens not seen, by the less harmful path."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from rarefy.activations.apply import apply_gating
from rarefy.activations.gatings.teal import TEAL
from rarefy.activations.sharing.even import Even
from rarefy.activations.sharing.greedy_blocks import GreedyBlocks
from rarefy.activations.watch import matrix_shape
from rarefy.core.attach import gated
from rarefy.core.errors import BadInput, Refused
from rarefy.core.roles import Sharing
from tests.evidence import check
from tests.papers.blocks import Chain, chain, tokens

NAME = "each block meets the density weighted by its matrices, on held-out tokens, with less output error than an even share"
SEEN, HELD = tokens(1), tokens(2)


def block_errors(model: Chain, dense: Chain) -> list[float]:
    """||Y - Y'|| over the last quarter, of each block alone, given what the dense chain gives it."""
    errors, x = [], torch.cat(SEEN)
    for block, plain in zip(model.blocks, dense.blocks, strict=True):
        y = plain(x)
        errors.append(float((block(x) - y)[:, 48:].norm()))
        x = y
    return errors


@torch.no_grad()
def holds(sharing: Sharing) -> None:
    open_, dense, x = chain(), chain(), HELD[0]
    apply_gating(open_, replace(TEAL, sharing=sharing, density=1.0), SEEN, HELD)
    assert torch.equal(open_(x), dense(x)), "density 1 is the dense model"
    even, greedy = chain(), chain()
    apply_gating(even, replace(TEAL, sharing=Even(), density=0.5), SEEN, HELD)
    record = apply_gating(greedy, replace(TEAL, sharing=sharing, density=0.5), SEEN, HELD)
    for index in range(2):
        mine = [g for g in record["gates"] if g["name"].startswith(f"blocks.{index}.")]
        sizes = [matrix_shape(greedy.get_submodule(g["name"]))[0] * matrix_shape(greedy.get_submodule(g["name"]))[1] for g in mine]
        assert len(mine) == 7 and sum(n * g["density_set"] for n, g in zip(sizes, mine, strict=True)) == pytest.approx(0.5 * sum(sizes)), "the budget of a block is met"
    assert all(g < 0.97 * e for g, e in zip(block_errors(greedy, dense), block_errors(even, dense), strict=True)), "no better than an even share"
    assert all(abs(g["density"] - g["density_set"]) < 0.02 for g in record["gates"]), "thresholds hold on tokens that were not seen"
    assert abs(record["ledger"]["mac_density"] - 0.5) < 0.02, "half of the multiply-adds remain"


@dataclass(frozen=True)
class EqualSteps(Sharing):
    """A step lowers a density by as much, whatever its matrix costs."""

    def densities(self, model: nn.Module, sizes: Mapping[str, int], density: float, batches: Sequence[Any]) -> dict[str, float]:
        return GreedyBlocks().densities(model, dict.fromkeys(sizes, 1), density, batches)


@check("teal", NAME, kind="method")
def test_teal() -> None:
    holds(TEAL.sharing)


@check("teal", NAME, kind="twin")
@pytest.mark.parametrize("twin", [EqualSteps(), Even()], ids=["costs ignored", "even"])
def test_without_costs_or_search_it_fails(twin: Sharing) -> None:
    with pytest.raises(AssertionError, match=r"budget|even share"):
        holds(twin)


def _twice(block: nn.Module) -> Chain:
    made = Chain(0)
    made.blocks = nn.ModuleList(copy.deepcopy(block) for _ in range(2))
    return made.eval()


@torch.no_grad()
def searches_in_place(sharing: Sharing) -> None:
    """The second block's densities are those of the search on it alone, given what the dense first block returns."""
    for factor in (1, 100):  # of the first block's own share in what it returns
        model = chain()
        model.blocks[0].mlp.down.weight.mul_(factor)
        sizes = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        found = sharing.densities(model, sizes, 0.5, SEEN)
        first = {name: size for name, size in sizes.items() if name.startswith("blocks.0.")}
        want = GreedyBlocks().densities(_twice(model.blocks[1]), first, 0.5, [model.blocks[0](x) for x in SEEN])
        assert {name: found[name.replace("blocks.0.", "blocks.1.")] for name in first} == want


class OnTheInputs(Sharing):
    """Every block is searched on what the model is given."""

    def densities(self, model: Any, sizes: Mapping[str, int], density: float, batches: Sequence[Any]) -> dict[str, float]:
        found: dict[str, float] = {}
        for index, block in enumerate(model.blocks):
            first = {name: size for name, size in sizes.items() if name.startswith("blocks.0.")}
            alone = GreedyBlocks().densities(_twice(block), first, density, batches)
            found |= {name.replace("blocks.0.", f"blocks.{index}."): d for name, d in alone.items()}
        return found


IN_PLACE = "a block is searched on what the dense blocks before it return"


@check("teal", IN_PLACE, kind="method")
def test_searched_in_place() -> None:
    searches_in_place(TEAL.sharing)


@check("teal", IN_PLACE, kind="twin")
def test_searched_in_place_twin() -> None:
    with pytest.raises(AssertionError):
        searches_in_place(OnTheInputs())


def test_the_search_is_refused_where_it_cannot_be_made() -> None:
    model = chain()
    apply_gating(model, replace(TEAL, sharing=Even()), SEEN, HELD)
    with pytest.raises(Refused, match="gates"):
        apply_gating(model, TEAL, SEEN, HELD)
    with pytest.raises(BadInput, match="chain of blocks"):
        apply_gating(nn.Sequential(nn.Linear(24, 24)), TEAL, SEEN, HELD)
    with pytest.raises(BadInput, match=r"density 0\.01"):
        apply_gating(chain(), replace(TEAL, density=0.01), SEEN, HELD)
    with pytest.raises(BadInput, match="0 held-out"):
        apply_gating(chain(), TEAL, SEEN, [])
    found = chain()
    apply_gating(found, TEAL, SEEN, HELD)
    assert len(gated(found)) == 14
