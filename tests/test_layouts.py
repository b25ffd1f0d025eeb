"""The contract of a layout catches what it says, and every layout says what it stores."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.kernels.dense import DenseMatrix
from rarefy.layouts import LAYOUTS
from rarefy.layouts.bitmask import Bitmask
from rarefy.testing import layouts as contract


@dataclass(frozen=True)
class Forgets(Bitmask):
    """Drops the last value that it stores."""

    def pack(self, weight: Tensor) -> Tensor:
        kept = weight.clone()
        kept[-1, -1] = 0.0
        return super().pack(kept)


@dataclass(frozen=True)
class Doubles(Bitmask):
    """Computes with other weights than it stores."""

    def matrix(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> DenseMatrix:
        matrix = DenseMatrix(super().matrix(packed, shape, dtype).dense())
        matrix.linear = lambda x, bias=None: 2 * x @ matrix.weight.t() + (0 if bias is None else bias)  # type: ignore[method-assign]
        return matrix


@dataclass(frozen=True)
class Trusts(Bitmask):
    """Believes every file."""

    def check(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
        return


@pytest.mark.parametrize(
    ("broken", "check", "message"),
    [
        (Forgets, contract.comes_back, "came back changed"),
        (Doubles, contract.computes_what_the_dense_matrix_does, "linear is not the dense product"),
        (Trusts, contract.what_is_not_whole_is_refused, "accepts"),
    ],
)
def test_a_broken_layout_is_caught(broken: type[Bitmask], check: object, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(broken())  # type: ignore[operator]


def test_integer_layouts_refuse_what_they_cannot_hold() -> None:
    for name in ("int8", "int4", "int4-asymmetric"):
        for bad in (float("nan"), float("inf"), 1e6):
            with pytest.raises(BadInput, match="keeps float16 scales"):
                LAYOUTS[name].pack(torch.tensor([[1.0, bad]]))


def test_zeros_stay_zeros_in_symmetric_layouts_and_zero_groups_are_not_stored() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 128, generator=generator) * (torch.rand(8, 128, generator=generator) < 0.5)
    weight.view(8, 4, 32)[:, 1] = 0
    for name in ("int8", "int4"):
        layout = LAYOUTS[name]
        back = layout.unpack(layout.pack(weight), (8, 128), weight.dtype)
        assert not back[weight == 0].any()
        assert layout.pack(weight).numel() < layout.pack(torch.ones(8, 128)).numel()


def test_a_q4_1_block_comes_back_exactly() -> None:
    generator = torch.Generator().manual_seed(1)
    scale, zero = torch.rand(6, 2, 1, generator=generator).half().float(), torch.randn(6, 2, 1, generator=generator).half().float()
    codes = torch.randint(0, 16, (6, 2, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15  # a Q4_1 block holds its least and its greatest value
    weight = (codes * scale + zero).view(6, 64)
    layout = LAYOUTS["int4-asymmetric"]
    assert torch.equal(layout.unpack(layout.pack(weight), (6, 64), weight.dtype), weight)
