"""The contract of a Statistic: streamed, order does not matter, inputs untouched, dead inputs exactly zero."""

from __future__ import annotations

import torch

from rarefy.core.roles import Statistic
from rarefy.testing import figures
from rarefy.testing.contract import contract


@contract(Statistic)
def order_of_batches_does_not_matter(part: Statistic) -> None:
    weight = figures.weight(6, 8)
    batches = [figures.SOURCES[part.source](weight, seed=seed) for seed in (1, 5, 9)]
    copies = [batch.clone() for batch in batches]
    results = []
    for order in (batches, batches[::-1]):
        state = part.start(weight)
        for batch in order:
            state = part.update(state, batch)
        results.append(part.finish(state))
    assert torch.allclose(results[0], results[1], rtol=1e-4, atol=1e-5), f"{part!r} depends on the order of batches"
    assert torch.isfinite(results[0]).all(), f"{part!r} is not finite or changed its input"
    assert all(torch.equal(a, b) for a, b in zip(batches, copies, strict=True)), f"{part!r} is not finite or changed its input"


@contract(Statistic)
def an_input_statistic_streams(part: Statistic) -> None:
    if part.source != "input":
        return
    weight = figures.weight(6, 8)
    whole = figures.rows(weight)
    once = part.finish(part.update(part.start(weight), whole))
    state = part.start(weight)
    for piece in torch.split(whole, 5):
        state = part.update(state, piece)
    assert torch.allclose(part.finish(state), once, rtol=1e-4, atol=1e-4), f"{part!r}: batches do not add up to the whole"


@contract(Statistic)
def a_dead_input_stays_exactly_zero(part: Statistic) -> None:
    if part.source != "input":
        return
    weight = figures.weight(6, 8)
    whole = figures.rows(weight)
    whole[:, [2, 5]] = 0.0
    state = part.start(weight)
    for piece in torch.split(whole, 5):
        state = part.update(state, piece)
    found = part.finish(state)
    assert not bool(found[..., [2, 5]].any()), f"{part!r}: an input that is always zero does not have an exact zero"
    live = [0, 1, 3, 4, 6, 7]
    assert bool((found.reshape(-1, 8)[:, live] != 0).any(0).all()), f"{part!r}: an input that is not zero looks dead"


@contract(Statistic)
def figures_fit_the_site_in_float32(part: Statistic) -> None:
    for shape in ((6, 8), (4, 3, 3, 2), (1, 1)):
        for dtype in (torch.float32, torch.bfloat16):
            weight = figures.weight(*shape)
            found = part.finish(part.update(part.start(weight), figures.SOURCES[part.source](weight).to(dtype)))
            wanted = weight.shape if part.source == "gradient" else (*found.shape[:-1], weight[0].numel())
            assert found.shape == wanted, f"{part!r}: {tuple(found.shape)} for a site of {shape}"
            assert found.dtype == torch.float32, f"{part!r}: {found.dtype} for {dtype} input"
