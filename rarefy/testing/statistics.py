"""The contract of a Statistic: streamed, order does not matter, inputs untouched, dead inputs exactly zero; of a ModelStatistic: fitting, pure."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.core.records import Site
from rarefy.core.roles import ModelStatistic, Statistic
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


def _whole() -> tuple[nn.Sequential, list[Site], list[tuple[Tensor, Tensor]]]:
    """A convolution, a batch norm and two linear layers, one of them frozen, in training mode; sites and batches (x, y)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 4, bias=False))
    model[4].weight.requires_grad_(False)
    sites = [Site("0.weight", "0", "weight", (3, 2, 2, 4), (0, 2, 3, 1)), Site("4.weight", "4", "weight", (5, 12)), Site("6.weight", "6", "weight", (4, 5))]
    return model, sites, [(torch.randn(6, 4, 3, 3, generator=figures.seeded(seed)), torch.arange(6) % 4) for seed in (1, 2)]


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@contract(ModelStatistic)
def figures_of_the_whole_model_fit_its_sites(part: ModelStatistic) -> None:
    model, sites, batches = _whole()
    found = part.collect(model, sites, batches, _cross_entropy)
    assert found.keys() == {s.name for s in sites}, f"{part!r}: figures of {sorted(found)}"
    for site in sites:
        value = found[site.name]
        assert tuple(value.shape) == site.shape, f"{part!r}: {tuple(value.shape)} for a site of {site.shape}"
        assert value.dtype == torch.float32, f"{part!r}: {value.dtype}"
        assert torch.isfinite(value).all(), f"{part!r}: not finite"
        assert bool(value.any()), f"{part!r}: all zero for {site.name}"


@contract(ModelStatistic)
def measuring_the_whole_model_changes_nothing(part: ModelStatistic) -> None:
    model, sites, batches = _whole()
    model.eval()
    model[2].train()  # flags of single modules are kept too
    before, flags, states = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    first = part.collect(model, sites, batches, _cross_entropy)
    again = part.collect(model, sites, batches, _cross_entropy)
    assert all(torch.equal(first[s.name], again[s.name]) for s in sites), f"{part!r} finds other figures the second time"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), f"{part!r} changed the model"
    assert [p.requires_grad for p in model.parameters()] == flags, f"{part!r} leaves other parameters trainable"
    assert [m.training for m in model.modules()] == states, f"{part!r} leaves the model in another mode"
    assert all(p.grad is None for p in model.parameters()), f"{part!r} leaves gradients behind"
    assert not any(m._forward_hooks for m in model.modules()), f"{part!r} leaves hooks behind"
