"""Every check of the Layer contract fails on a layer that is broken in the way it looks for."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy.testing as contracts
from rarefy.core.records import Context
from rarefy.core.roles import Layer
from rarefy.experts.layers.product_keys import QueryNorm
from rarefy.experts.layers.sub_tokens import MultiHead, SubTokens
from rarefy.experts.moe import MoE
from rarefy.testing.contract import contracts_of
from tests.test_contracts_negative import caught


class Whole(nn.Module):
    """A sound layer; each broken one changes what it does."""

    def __init__(self) -> None:
        super().__init__()
        inner: Any = SubTokens(2, capacity=None).make(8, 4, 6)
        self.inner = inner

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        y: Tensor = self.inner(x, context)
        return y


class OneRow(Whole):
    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        return super().forward(x, context).mean(0, keepdim=True)


class Single(Whole):
    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        return super().forward(x, context).float()


class AddsToPadding(Whole):
    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        return super().forward(x, context) + 0.1


class SeesPadding(Whole):
    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        return super().forward(x, context) * x.mean()


class Idle(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Unseen(Whole):
    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        inner: Any = self.inner
        return super().forward(x, None if context is None else replace(context, valid=torch.zeros(len(x), dtype=torch.bool))) + inner.merge(x) * (
            1 if context is None or context.valid is None else context.valid[:, None]
        )


class Counts(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.drawn = torch.rand(())

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        return super().forward(x, context) * self.drawn


class Averages(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.norm = QueryNorm(8)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        valid = None if context is None else context.valid
        return super().forward(self.norm(x, valid).to(x), context)


@dataclass(frozen=True)
class Makes(Layer):
    """A layer of the class `kind`."""

    name = "makes"
    kind: type[nn.Module] = Whole

    def make(self, width: int, experts: int, inner: int, /) -> nn.Module:
        return self.kind()


@dataclass(frozen=True)
class SaysNotCausal(Makes):
    name = "says-not-causal"

    def causal(self, training: bool) -> bool:
        return False


BROKEN: list[tuple[Layer, str, str]] = [
    (Makes(OneRow), "rows_of_any_shape_and_type_come_out_as_they_went_in", r"gives \(1, 8\)"),
    (Makes(Single), "rows_of_any_shape_and_type_come_out_as_they_went_in", "does not keep bfloat16"),
    (Makes(AddsToPadding), "padding_comes_out_as_zeros_and_changes_nothing", "does not come out as zeros"),
    (Makes(SeesPadding), "padding_comes_out_as_zeros_and_changes_nothing", "changes other rows"),
    (Makes(SeesPadding), "its_causal_flag_is_true_of_rows", "causal = True"),
    (Makes(Averages), "its_causal_flag_is_true_of_rows", "training = True"),
    (SaysNotCausal(), "its_causal_flag_is_true_of_rows", "causal = False"),
    (Makes(Idle), "every_parameter_of_it_learns", "no gradient for scale"),
    (Makes(Unseen), "a_trace_sees_every_assignment", r"shows a Trace \[0\]"),
    (Makes(Counts), "copies_and_saved_layers_are_the_same", "does not survive"),
]


@pytest.mark.parametrize(("part", "check", "message"), BROKEN, ids=[f"{i}-{c}" for i, (_, c, _) in enumerate(BROKEN)])
def test_a_broken_layer_is_caught_by_the_check_that_looks_for_it(part: Layer, check: str, message: str) -> None:
    found = caught(part)
    assert check in found, f"{check} holds for {part!r}; broken are {sorted(found)}"
    assert re.search(message, found[check]), found[check]


def test_every_check_has_a_layer_that_it_catches_and_the_whole_one_keeps_all() -> None:
    assert {f.__name__ for f in contracts_of(Layer)} <= {check for _, check, _ in BROKEN}
    assert contracts.check(Makes()) > 0
    assert isinstance(Whole().inner, MultiHead) and isinstance(Whole().inner.moe, MoE)
