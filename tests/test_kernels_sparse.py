"""Blocks, compressed sparse rows and n of m against float64: every instruction set, odd shapes, poisoned memory, hostile bytes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from rarefy.core.errors import BadFile, BadInput
from rarefy.kernels.block import BlockMatrix
from rarefy.kernels.block import reference as blocks
from rarefy.kernels.compact import CompactMatrix
from rarefy.kernels.library import SWITCH, available, instruction_set, native, pointer
from rarefy.kernels.n_m import NofMMatrix
from rarefy.kernels.n_m import reference as n_of_m
from rarefy.kernels.samples import samples
from rarefy.layouts.block import Block, Csr
from rarefy.layouts.compact import Compact
from rarefy.layouts.condensed import Condensed
from rarefy.layouts.n_m import NofM
from tests.test_kernels import EXACT, GUARD, NATIVE, assert_is_product, poisoned

SIZES = ((1, 1), (4, 1), (16, 1), (1, 32), (4, 4), (3, 5), (16, 16), (20, 2), (1, 7), (8, 1))
RATIOS = ((1, 4), (2, 4), (3, 4), (1, 2), (1, 8), (5, 8), (2, 5), (3, 7), (1, 3), (8, 8))


def layout_of(size):
    return Csr() if size == (1, 1) else Block(sizes=(size,))


def stored(layout, weight):
    """The matrix that a layout makes of its own bytes, NaN around everything that it keeps."""
    shape = (weight.shape[0], weight.shape[1])
    matrix = layout.matrix(layout.pack(weight), shape, weight.dtype)
    if isinstance(matrix, BlockMatrix):
        index = poisoned(matrix.index.view(torch.uint8)).view(torch.uint16)
        return BlockMatrix(matrix.counts, index, poisoned(matrix.values), shape)
    return NofMMatrix(poisoned(matrix.values), poisoned(matrix.positions), matrix.n, matrix.m, shape[1])


def blocked(weight, size, density, generator):
    """The weight with whole blocks removed."""
    high, wide = -(-weight.shape[0] // size[0]), -(-weight.shape[1] // size[1])
    keep = torch.rand(high, wide, generator=generator) < density
    keep[0, 0] = True
    return weight * keep.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)[: weight.shape[0], : weight.shape[1]]


def of_ratio(weight, n, m):
    """The weight with the first n of every m columns by magnitude kept."""
    groups = F.pad(weight, (0, -weight.shape[1] % m)).unflatten(1, (-1, m))
    last = groups.abs().argsort(-1, descending=True)[..., n:]
    return groups.scatter(-1, last, 0.0).flatten(1)[:, : weight.shape[1]].contiguous()


def written(matrix, x, bias):
    """The product, with a check that nothing beside it was written."""
    call = native().blocks_linear if isinstance(matrix, BlockMatrix) else native().n_of_m_linear
    room = torch.full((x.shape[0] * matrix.rows + 2 * GUARD,), 7.0)
    y = room[GUARD : GUARD + x.shape[0] * matrix.rows]
    call(*matrix.arguments(), pointer(x), pointer(bias), pointer(y), x.shape[0], 2)
    assert (room[:GUARD] == 7).all() and (room[GUARD + y.numel() :] == 7).all()
    return y.view(x.shape[0], matrix.rows)


@NATIVE
@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_blocks_are_the_product(isa, size):
    generator = torch.Generator().manual_seed(7)
    with instruction_set(isa):
        for weight, x, bias in samples():
            weight = blocked(torch.where(weight == 0, 0.5, weight), size, 0.4, generator) if size != (1, 1) else weight
            matrix = stored(layout_of(size), weight)
            assert matrix.fast and torch.equal(matrix.dense(), weight)
            assert_is_product(written(matrix, poisoned(x), None if bias is None else poisoned(bias)), x, weight, bias)


@NATIVE
@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("batch", [17, 33, 64, 150])
def test_many_rows_of_x_are_the_product(isa, batch):
    generator = torch.Generator().manual_seed(batch)
    with instruction_set(isa):
        for size in SIZES:
            weight = blocked(torch.randn(70, 300, generator=generator), size, 0.3, generator)
            x, bias = torch.randn(batch, 300, generator=generator), torch.randn(70, generator=generator)
            assert_is_product(written(stored(layout_of(size), weight), poisoned(x), bias), x, weight, bias)


@NATIVE
@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("ratio", RATIOS, ids=str)
def test_n_of_m_is_the_product(isa, ratio):
    n, m = ratio
    with instruction_set(isa):
        for weight, x, bias in samples():
            weight = of_ratio(weight, n, m)
            matrix = stored(NofM(groups=(m,)), weight)
            assert matrix.fast and torch.equal(matrix.dense(), weight)
            assert torch.equal(n_of_m.unpack(matrix.values, matrix.positions, matrix.n, m, weight.shape[1]), weight)
            assert_is_product(written(matrix, poisoned(x), None if bias is None else poisoned(bias)), x, weight, bias)


@NATIVE
@pytest.mark.parametrize("isa", available())
def test_a_matrix_of_a_model(isa):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(576, 1536, generator=generator)
    thinned = {"csr": weight * (torch.rand(weight.shape, generator=generator) < 0.1), "2:4": of_ratio(weight, 2, 4), "4x1": blocked(weight, (4, 1), 0.3, generator)}
    with instruction_set(isa):
        for name, layout in {"csr": Csr(), "2:4": NofM(), "4x1": Block()}.items():
            matrix = stored(layout, thinned[name])
            for batch in (1, 8, 70):
                x = torch.randn(batch, 1536, generator=generator)
                assert_is_product(matrix.linear(x), x, thinned[name], None)


@NATIVE
@pytest.mark.parametrize("layout", [Csr(), Block(sizes=((4, 1),)), Block(sizes=((1, 32),)), NofM()], ids=str)
@pytest.mark.parametrize("batch", [1, 9, 100])
def test_threads_do_not_change_a_bit(layout, batch):
    weight = of_ratio(torch.randn(700, 300), 1, 4)
    matrix, x = layout.matrix(layout.pack(weight), (700, 300), torch.float32), torch.randn(batch, 300)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(matrix.linear(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("layout", [Csr(), Block(), Block(sizes=((3, 5),)), NofM(), NofM(groups=(7,)), Condensed(), Compact()], ids=str)
def test_other_dtypes_strides_and_gradients_take_the_reference(layout, monkeypatch):
    weight = of_ratio(torch.randn(6, 20), 2, 4)
    matrix = layout.matrix(layout.pack(weight), (6, 20), torch.float32)
    x = torch.randn(20, 3).t()
    torch.testing.assert_close(matrix.linear(x), F.linear(x, weight), **EXACT)
    torch.testing.assert_close(matrix.linear(x.double()), F.linear(x.double(), weight.double()))
    live = torch.randn(2, 20, requires_grad=True)
    matrix.linear(live).sum().backward()
    torch.testing.assert_close(live.grad, weight.sum(0).expand(2, 20))
    half = layout.matrix(layout.pack(weight.bfloat16()), (6, 20), torch.bfloat16)
    assert not half.fast and torch.equal(half.dense(), weight.bfloat16())
    monkeypatch.setenv(SWITCH, "off")
    off = layout.matrix(layout.pack(weight), (6, 20), torch.float32)
    assert not off.fast and torch.equal(off.dense(), weight)
    torch.testing.assert_close(off.linear(x), F.linear(x, weight), **EXACT)


@pytest.mark.parametrize("layout", [Csr(), NofM(), Compact()], ids=str)
def test_compiled_code_takes_the_reference_without_a_break(layout):
    weight = of_ratio(torch.randn(6, 20), 2, 4)
    matrix, x = layout.matrix(layout.pack(weight), (6, 20), torch.float32), torch.randn(2, 20)
    run = torch.compile(lambda x: matrix.linear(x), fullgraph=True, backend="eager")
    torch.testing.assert_close(run(x), F.linear(x, weight), **EXACT)


@pytest.mark.parametrize("layout", [Csr(), Block(), NofM(), Condensed(), Compact()], ids=str)
def test_what_a_file_may_hold_comes_back(layout):
    for weight in (torch.zeros(5, 9), torch.full((3, 7), float("nan")), torch.tensor([[0.0, -0.0, float("inf"), 1e-45]])):
        shape = (weight.shape[0], weight.shape[1])
        packed = layout.pack(weight)
        layout.check(packed, shape, torch.float32, "w")
        back = layout.unpack(packed, shape, torch.float32)
        assert torch.equal(back.nan_to_num(7.0), weight.nan_to_num(7.0)) and torch.equal(back.isnan(), weight.isnan())


def test_the_smallest_structure_is_found():
    generator = torch.Generator().manual_seed(0)
    for size in ((4, 1), (16, 1), (1, 32), (4, 4)):
        packed = Block().pack(blocked(torch.randn(64, 128, generator=generator), size, 0.2, generator))
        assert packed[:4].view(torch.int16).tolist() == list(size)
    for n, m in ((1, 4), (2, 4), (1, 8), (1, 2)):
        assert NofM().pack(of_ratio(torch.randn(64, 128, generator=generator), n, m))[:2].tolist() == [n, m]


def test_layouts_refuse_what_they_cannot_hold():
    with pytest.raises(BadInput, match="65536 blocks"):
        Csr().pack(torch.zeros(1, 65537))
    with pytest.raises(BadInput, match="65536 columns"):
        Condensed().pack(torch.zeros(1, 65537))
    with pytest.raises(BadInput, match="1 to 256"):
        Block(sizes=((0, 4),))
    with pytest.raises(BadInput, match="2 to 8 columns"):
        NofM(groups=(9,))


def refused(layout, packed, shape, match):
    with pytest.raises(BadFile, match=match):
        layout.check(packed, shape, torch.float32, "w")


def test_hostile_bytes_are_refused_before_they_are_used():
    weight = torch.eye(4, 100)
    packed = Csr().pack(weight)
    counts, index = packed[:16].view(torch.int32), packed[64:72].view(torch.int16)
    for place, value, match in ((counts, 200, "more of them"), (counts, -1, "more of them"), (counts, 40, "bytes"), (index, 100, "past the last"), (index, -1, "past the last")):
        before = int(place[0])
        place[0] = value
        refused(Csr(), packed, (4, 100), match)
        place[0] = before
    counts[0], counts[1] = 2, 0
    index[1] = 0  # the same column twice
    refused(Csr(), packed, (4, 100), "do not ascend")
    packed = Block().pack(weight)
    for height, width in ((0, 1), (-4, 1), (300, 1)):
        packed[:4].view(torch.int16)[:] = torch.tensor([height, width])
        refused(Block(), packed, (4, 100), "1 to 256")
    packed = NofM().pack(torch.ones(2, 7))
    refused(NofM(), torch.cat([torch.tensor([0], dtype=torch.uint8), packed[1:]]), (2, 7), "1 <= n <= m")
    refused(NofM(), torch.cat([torch.tensor([9], dtype=torch.uint8), packed[1:]]), (2, 7), "1 <= n <= m")
    packed[64:72] = 255
    refused(NofM(), packed, (2, 7), "past the last column")


def test_hostile_condensed_and_compacted_bytes_are_refused():
    packed = Condensed().pack(torch.eye(4, 100))
    fan_in, column = packed[:4].view(torch.int32), packed[128:136].view(torch.int16)
    column[3] = 100
    refused(Condensed(), packed, (4, 100), "past the last")
    fan_in[0] = 2  # within the padding: the rows would hold columns twice
    refused(Condensed(), packed, (4, 100), "past the last")
    for wrong, match in ((-1, "weights a row"), (101, "weights a row"), (50, "bytes")):
        fan_in[0] = wrong
        refused(Condensed(), packed, (4, 100), match)
    packed = Compact().pack(torch.ones(4, 9))
    packed[0] = 255
    refused(Compact(), packed, (4, 9), "past column 4")
    packed[0] = 0
    refused(Compact(), packed, (4, 9), "bytes")
    empty = CompactMatrix(torch.tensor([True, True]), torch.tensor([False]), torch.ones(2, 0))  # a file may say so
    assert empty.linear(torch.ones(3, 1), torch.tensor([1.0, 2.0])).tolist() == [[1.0, 2.0]] * 3 and empty.dense().tolist() == [[0.0], [0.0]]
    with pytest.raises(BadFile, match="2 rows and 1 columns are kept"):
        CompactMatrix(torch.tensor([True, True]), torch.tensor([True]), torch.ones(1, 1))


@NATIVE
@pytest.mark.parametrize("isa", available())
def test_condensed_and_compacted_are_the_product(isa):
    generator = torch.Generator().manual_seed(3)
    with instruction_set(isa):
        for weight, x, bias in samples():
            rows, columns = torch.rand(weight.shape[0], 1, generator=generator) < 0.7, torch.rand(weight.shape[1], generator=generator) < 0.6
            for layout, thinned in ((Condensed(), weight), (Compact(), weight), (Compact(), weight * rows), (Compact(), weight * columns), (Compact(), weight * rows * columns)):
                shape = (weight.shape[0], weight.shape[1])
                matrix = layout.matrix(layout.pack(thinned), shape, torch.float32)
                assert torch.equal(matrix.dense(), thinned)
                assert_is_product(matrix.linear(x, bias), x, thinned, bias)


@NATIVE
def test_hostile_metadata_is_refused_by_the_native_side():
    one, index = torch.ones(3, 1, 1), torch.tensor([0, 2, 1], dtype=torch.uint16)
    counts = torch.tensor([2, 1], dtype=torch.int32)
    assert BlockMatrix(counts, index, one, (2, 3)).fast
    for bad, match in (([3, 0], "do not ascend"), ([2, 2], "more blocks than are stored"), ([1, 1], "fewer blocks"), ([-1, 4], "more blocks")):
        with pytest.raises(BadFile, match=match):
            BlockMatrix(torch.tensor(bad, dtype=torch.int32), index, one, (2, 3))
    with pytest.raises(BadFile, match="past the last column"):
        BlockMatrix(counts, index, one, (2, 2))
    with pytest.raises(BadFile, match="do not fit"):
        BlockMatrix(counts, index, one, (3, 3))
    starts = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="1 to 256 rows"):
        native().blocks_starts(pointer(counts), pointer(index), 3, pointer(starts), 2, 3, 0, 1)
    with pytest.raises(ValueError, match="do not account for"):
        native().blocks_linear(pointer(index), pointer(starts), pointer(one), 3, 2, 3, 1, 1, pointer(one), 0, pointer(one), 1, 1)
    with pytest.raises(ValueError, match="null pointer"):
        native().n_of_m_linear(0, pointer(index), 1, 4, 2, 4, pointer(one), 0, pointer(one), 1, 1)
    with pytest.raises(ValueError, match="1 <= n <= m"):
        native().n_of_m_check(pointer(index), 1, 1, 4, 2, 9)
    positions = torch.full((1, 2), 255, dtype=torch.uint8)
    with pytest.raises(BadFile, match="past the last column"):
        NofMMatrix(torch.ones(1, 2), positions, 2, 4, 3)
    with pytest.raises(BadFile, match="positions"):
        NofMMatrix(torch.ones(1, 2), positions[:, :1], 2, 4, 4)


def test_references_agree_with_the_layouts():
    weight = blocked(torch.randn(9, 50), (3, 5), 0.5, torch.Generator().manual_seed(1))
    matrix = Block(sizes=((3, 5),)).matrix(Block(sizes=((3, 5),)).pack(weight), (9, 50), torch.float32)
    x = torch.randn(2, 50)
    torch.testing.assert_close(blocks.linear(x, matrix.counts, matrix.index, matrix.values, 9, None), F.linear(x, weight), **EXACT)
