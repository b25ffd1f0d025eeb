"""The contract of a Criterion: a float32 rating of every weight, pure, zero weights least, blind to signs."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.core.roles import Criterion, asks
from rarefy.testing import figures
from rarefy.testing.contract import contract

SHAPES = ((1, 1), (7, 13), (4, 3, 3, 2))


def _rate(part: Criterion, weight: Tensor, stats: dict[str, Tensor]) -> Tensor:
    return part.scores(weight, generator=figures.seeded(), **stats)


@contract(Criterion)
def scores_are_float32_of_the_weights_shape(part: Criterion) -> None:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = figures.weight(*shape).to(dtype)
            scores = _rate(part, weight, figures.statistics(asks(part.scores), weight.float()))
            assert scores.shape == weight.shape, f"{part!r}: {tuple(scores.shape)} {scores.dtype} for {shape} {dtype}"
            assert scores.dtype == torch.float32, f"{part!r}: {tuple(scores.shape)} {scores.dtype} for {shape} {dtype}"
            assert torch.isfinite(scores).all(), f"{part!r}: scores of {shape} {dtype} are not finite"


@contract(Criterion)
def scoring_is_pure(part: Criterion) -> None:
    weight = figures.weight(6, 8)
    stats = figures.statistics(asks(part.scores), weight)
    before = (weight.clone(), {name: value.clone() for name, value in stats.items()})
    first, second = _rate(part, weight, stats), _rate(part, weight, stats)
    assert torch.equal(first, second), f"{part!r}: the same generator and inputs give other scores"
    assert torch.equal(weight, before[0]), f"{part!r} changed its inputs"
    assert all(torch.equal(stats[name], value) for name, value in before[1].items()), f"{part!r} changed its inputs"


@contract(Criterion)
def zero_weights_are_rated_least(part: Criterion) -> None:
    weight = figures.weight(6, 8)
    zero = torch.rand(weight.shape, generator=figures.seeded(3)) < 0.3
    weight[zero] = 0.0
    scores = _rate(part, weight, figures.statistics(asks(part.scores), weight))
    assert scores[zero].max() <= scores[~zero].min(), f"{part!r} rates a zero weight above another"


@contract(Criterion)
def the_sign_of_a_weight_does_not_matter(part: Criterion) -> None:
    weight = figures.weight(6, 8)
    flipped = torch.where(torch.rand(weight.shape, generator=figures.seeded(3)) < 0.5, -weight, weight)
    stats = figures.statistics(asks(part.scores), weight)
    same = torch.equal(_rate(part, weight, stats), _rate(part, flipped, stats))
    assert same, f"{part!r} rates w and -w differently: a signed criterion declares so"
