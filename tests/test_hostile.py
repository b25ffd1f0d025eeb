"""The fuzzer over layouts finds what it is for, and its cases are the same in every process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.core.errors import BadFile
from rarefy.kernels.dense import DenseMatrix
from rarefy.kernels.library import native, pointer
from rarefy.layouts import LAYOUTS
from rarefy.layouts.bitmask import Bitmask
from rarefy.layouts.block import Block, Csr
from rarefy.layouts.compact import Compact
from rarefy.layouts.condensed import Condensed
from rarefy.layouts.n_m import NofM
from rarefy.testing.hostile import case, outcome, survey


@dataclass(frozen=True)
class TrustsColumns(Csr):
    """Counts bytes and does not look at columns."""

    def check(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
        try:
            super().check(packed, shape, dtype, name)
        except BadFile as error:
            if "ascend" not in error.rule:
                raise


@dataclass(frozen=True)
class TrustsPositions(NofM):
    """Counts bytes and does not look at positions."""

    def check(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
        try:
            super().check(packed, shape, dtype, name)
        except BadFile as error:
            if "position" not in error.rule:
                raise


@dataclass(frozen=True)
class Misreads(Bitmask):
    """Computes with one more than is stored in the last place."""

    def matrix(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Any:
        matrix = DenseMatrix(super().matrix(packed, shape, dtype).dense())
        right = matrix.linear
        matrix.linear = lambda x, bias=None: right(x, bias) + torch.nn.functional.pad(x[:, -1:], (shape[0] - 1, 0))  # type: ignore[method-assign]
        return matrix


@pytest.mark.parametrize(("broken", "message"), [(TrustsColumns, "accepted, and then|Error"), (TrustsPositions, "accepted, and then|Error"), (Misreads, "is not the dense one")])
def test_a_layout_that_trusts_or_misreads_is_found(broken: Any, message: str) -> None:
    found = survey({"broken": broken()}, 80)
    assert found["wrong"]
    for wrong in found["wrong"]:
        assert any(part in wrong for part in message.split("|")), wrong


def test_a_case_is_its_number_and_both_verdicts_occur_in_every_layout() -> None:
    one, two = case(LAYOUTS["csr"], 5), case(LAYOUTS["csr"], 5)
    assert one.shape == two.shape and one.dtype == two.dtype and torch.equal(one.packed, two.packed)
    for layout in LAYOUTS.values():
        assert {outcome(layout, number).accepted for number in range(12)} == {True, False}


def test_a_compacted_file_may_keep_columns_and_no_rows() -> None:
    packed = Compact().pack(torch.zeros(4, 9))
    packed[64] = 3
    Compact().check(packed, (4, 9), torch.float32, "w")
    matrix = Compact().matrix(packed, (4, 9), torch.float32)
    assert matrix.linear(torch.ones(2, 9), torch.arange(4.0)).tolist() == [[0.0, 1.0, 2.0, 3.0]] * 2 and not matrix.dense().any()


def test_a_block_holds_nothing_past_the_matrix() -> None:
    """The kernels multiply it by zeros, and a NaN would be one in rows that hold none."""
    layout = Block(sizes=((2, 3),))
    weight = torch.zeros(3, 4)
    weight[:, 3] = weight[2] = 1.0
    packed = layout.pack(weight)
    layout.check(packed, (3, 4), torch.float32, "w")
    assert torch.equal(layout.unpack(packed, (3, 4), torch.float32), weight)
    values = packed[192:].view(torch.float32)[: 3 * 6].view(3, 3, 2)  # blocks (0, 1), (1, 0), (1, 1)
    for block, column, row in ((0, 1, 0), (0, 2, 1), (1, 0, 1), (2, 0, 1), (2, 2, 0)):
        values[block, column, row] = float("nan")
        with pytest.raises(BadFile, match="past the last row or column"):
            layout.check(packed, (3, 4), torch.float32, "w")
        values[block, column, row] = 0.0


def test_a_condensed_file_counts_no_more_columns_than_it_packs() -> None:
    with pytest.raises(BadFile, match="at most 65536 columns are counted, the plan says 65537"):
        Condensed().check(Condensed().pack(torch.zeros(1, 9)), (1, 2**16 + 1), torch.float32, "w")


@pytest.mark.skipif(native() is None, reason="the native kernels were not built here")
def test_a_decoder_that_is_not_whole_is_refused() -> None:
    made, x, index = native().Decoder(4, 4, 1, 1, 4, 3, 1, 8, 1e-5), torch.ones(64), torch.zeros(1, dtype=torch.int64)

    def step() -> None:
        made.step(pointer(x), pointer(index), pointer(index), 1, pointer(x), pointer(x), 1, 8, pointer(index), 0, pointer(x), 1)

    with pytest.raises(ValueError, match="the final norm, cos, sin or the head is missing"):
        step()
    made.shared(pointer(x), pointer(x), pointer(x))
    made.dense(0, "head", pointer(x), 3, 4, 0)
    with pytest.raises(ValueError, match="the norms of a layer are missing"):
        step()
    made.norms(0, pointer(x), pointer(x))
    for where in ("q", "k", "v", "o", "gate", "up"):
        with pytest.raises(ValueError, match="a linear of a layer is missing"):
            step()
        made.dense(0, where, pointer(x), 4, 4, 0)
