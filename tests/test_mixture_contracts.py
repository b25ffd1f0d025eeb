"""Every check of the mixtures' contract fails on a part that is broken in the way it looks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy.testing as contracts
from rarefy.core.records import Context, Mix, Scores, Slots
from rarefy.core.roles import Mixture
from rarefy.experts.mixtures.smear import Smear
from rarefy.experts.mixtures.soft_slots import SoftSlots
from rarefy.testing.contract import contracts_of
from tests.test_contracts_negative import caught

Broken = Callable[[Any, Scores, Context], Slots | Mix]


@dataclass(frozen=True)
class Changed(Mixture):
    """`broken` says what becomes of the inner mixture's answer."""

    name = "changed"
    broken: Broken
    inner: Mixture

    @property
    def bank(self) -> Any:  # type: ignore[override]
        return self.inner.bank

    def affinity(self, width: int, experts: int, /) -> nn.Module:
        return self.inner.affinity(width, experts)

    def __call__(self, scores: Scores, context: Context) -> Slots | Mix:
        return self.broken(self.inner(scores, context), scores, context)


class InAutocast(SoftSlots):
    name = "in-autocast"

    def affinity(self, width: int, experts: int, /) -> nn.Module:
        return Plain(width, experts)


class Plain(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.randn(width, experts))

    def forward(self, x: Tensor, context: Context) -> Scores:
        return Scores((x @ self.phi)[..., None].float())


class SaysCausal(SoftSlots):
    name = "says-causal"

    def causal(self, training: bool) -> bool:
        return True


def more(m: Slots, scores: Scores, context: Context) -> Slots:
    return replace(m, combine=1.01 * m.combine)


def heavier(m: Mix, scores: Scores, context: Context) -> Mix:
    return replace(m, weight=1.01 * m.weight)


def all_live(m: Mix, scores: Scores, context: Context) -> Mix:
    return replace(m, weight=scores.logits.softmax(1))


def over_nobody(m: Mix, scores: Scores, context: Context) -> Mix:
    return m if context.live is None else replace(m, weight=m.weight / m.weight.sum(1, keepdim=True))


def padded(m: Slots, scores: Scores, context: Context) -> Slots:
    return replace(m, dispatch=scores.logits.softmax(1))


def whole(m: Slots, scores: Scores, context: Context) -> Slots:
    return replace(m, dispatch=m.dispatch.mean(0, keepdim=True).expand_as(m.dispatch))


def deaf(m: Slots, scores: Scores, context: Context) -> Slots:
    return Slots(m.dispatch.detach(), m.combine.detach())


@pytest.mark.parametrize(
    ("part", "function"),
    [
        (Changed(more, SoftSlots(2)), "shares_add_up"),
        (Changed(heavier, Smear()), "shares_add_up"),
        (Changed(all_live, Smear()), "shares_add_up"),
        (Changed(over_nobody, Smear()), "without_anybody_live_nothing_comes_out_wrong"),
        (Changed(padded, SoftSlots()), "padding_takes_no_part"),
        (Changed(whole, SoftSlots()), "groups_do_not_see_each_other"),
        (SaysCausal(), "its_causal_flag_is_true_of_its_layer"),
        (Changed(deaf, SoftSlots()), "every_parameter_learns_from_the_task"),
        (InAutocast(), "it_mixes_in_float32_under_autocast"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_broken_part_is_caught(part: Mixture, function: str) -> None:
    assert function in {f.__name__ for f in contracts_of(type(part))}
    assert function in caught(part)


def test_what_a_broken_part_is_made_of_is_sound() -> None:
    assert contracts.check(SoftSlots(2)) > 0
    assert contracts.check(Smear()) > 0
