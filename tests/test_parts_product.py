"""Every allocation x pattern x kind of module: exact, or refused with a BadInput."""

from __future__ import annotations

import pytest
import torch

from rarefy.core import discover
from rarefy.core.errors import BadInput
from rarefy.core.records import Site, Units
from rarefy.core.roles import Allocation, Pattern
from rarefy.testing.allocations import asked
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.solvers.keep import Keep

SITES = {
    "linear": (torch.Size((12, 8)), (Site("layers.0.w", "layers.0", "weight", (12, 8)),)),
    "conv2d": (torch.Size((8, 4, 3, 3)), (Site("layers.0.w", "layers.0", "weight", (8, 3, 3, 4), axes=(0, 2, 3, 1)),)),
    "conv1d": (torch.Size((8, 4, 5)), (Site("layers.0.w", "layers.0", "weight", (8, 5, 4), axes=(0, 2, 1)),)),
    "embedding": (torch.Size((9, 8)), (Site("layers.0.w", "layers.0", "weight", (9, 8), role="embedding"),)),
    "transposed": (torch.Size((8, 12)), (Site("layers.0.w", "layers.0", "weight", (12, 8), axes=(1, 0)),)),
    "experts": (torch.Size((3, 8, 4)), tuple(Site("layers.0.w", "layers.0", "weight", (8, 4), expert=e) for e in range(3))),
}
ALLOCATIONS = [part for kind in discover.methods(Allocation).values() for part in kind.examples()]
PATTERNS = [part for kind in discover.methods(Pattern).values() for part in kind.examples()]


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=repr)
def test_exact_or_refused(allocation: Allocation, pattern: Pattern, kind: str) -> None:
    shape, sites = SITES[kind]
    tensor = torch.randn(shape)
    before = tensor.clone()
    units = [Units(site.name, site.shape, ()) for site in sites]
    counts = allocation.counts(units, tensor.numel() // 2, **asked(allocation, units))
    assert sum(counts.values()) == tensor.numel() // 2
    views = {site.name: site.read(tensor) for site in sites}
    assert all(tuple(views[site.name].shape) == site.shape for site in sites)
    try:
        budget = {site.name: pattern.nearest(site.shape, counts[site.name]) for site in sites}
    except BadInput:
        with pytest.raises(BadInput, match=r"shape .*needs"):
            pattern.mask(views[sites[0].name], counts[sites[0].name])
        return
    pruned = Keep(Magnitude()).solve(views, budget, stats={}, pattern=pattern)
    for site in sites:
        site.write(tensor, pruned[site.name].weight)
    assert int((tensor != 0).sum()) == sum(budget.values())
    assert torch.equal(tensor[tensor != 0], before[tensor != 0])
