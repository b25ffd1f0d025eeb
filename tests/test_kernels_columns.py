"""Matrices stored column by column against their references: what zeros skip is never read, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from rarefy.core.errors import BadFile
from rarefy.kernels.columns import ColumnsMatrix, reference
from rarefy.kernels.grouped.reference import rounded
from rarefy.kernels.grouped_columns import GroupedColumnsMatrix
from rarefy.kernels.grouped_columns.reference import codes_of, columns_of
from rarefy.kernels.library import SWITCH, available, instruction_set, native, pointer
from rarefy.kernels.samples import samples
from rarefy.layouts import LAYOUTS
from tests.test_kernels import GUARD, NATIVE, assert_is_product, poisoned

SHAPES = ((1, 1), (7, 13), (576, 1536), (3, 700), (200, 5))
NAN = float("nan")


def sparse_rows(batch, columns, density, seed=0):
    """x [B, I] with zeros, some of them negative."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, columns, generator=generator)
    return torch.where(torch.rand(batch, columns, generator=generator) < density, x, torch.where(x > 0, 0.0, -0.0))


def written(matrix, call, x, bias, threads):
    """The product, with a check that nothing beside it was written."""
    room = torch.full((x.shape[0] * matrix.rows + 2 * GUARD,), 7.0)
    y = room[GUARD : GUARD + x.shape[0] * matrix.rows]
    call(*matrix.arguments(), pointer(x), pointer(bias), pointer(y), x.shape[0], threads)
    assert (room[:GUARD] == 7).all() and (room[GUARD + y.numel() :] == 7).all()
    return y.view(x.shape[0], matrix.rows)


@NATIVE
@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("threads", [1, 2])
def test_columns_are_the_product(isa, threads):
    with instruction_set(isa):
        for weight, x, bias in samples():
            matrix = ColumnsMatrix(poisoned(weight.t().contiguous()))
            assert matrix.fast and torch.equal(matrix.dense(), weight)
            y = written(matrix, native().columns_linear, poisoned(x), None if bias is None else poisoned(bias), threads)
            assert_is_product(y, x, weight, bias)


@NATIVE
@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_zeros_of_x_do_not_change_the_product(isa, density):
    with instruction_set(isa):
        for rows, columns in SHAPES:
            weight, bias = torch.randn(rows, columns), torch.randn(rows)
            matrix = ColumnsMatrix(poisoned(weight.t().contiguous()))
            for batch in (1, 2, 3, 7, 16):
                x = poisoned(sparse_rows(batch, columns, density, rows + batch))
                y = written(matrix, native().columns_linear, x, bias, 2)
                assert_is_product(y, x, weight, bias)
                assert torch.allclose(y, reference.linear(x, matrix.values, bias), rtol=1e-4, atol=1e-4)


@NATIVE
@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("batch", [1, 2, 4, 7])
def test_a_column_that_every_row_skips_is_never_read(isa, batch):
    weight, x = torch.randn(70, 300), torch.randn(batch, 300)
    skipped = torch.rand(300) < 0.5
    x[:, skipped] = 0.0
    clean = ColumnsMatrix(weight.t().contiguous())
    weight[:, skipped] = NAN
    with instruction_set(isa):
        y = ColumnsMatrix(weight.t().contiguous()).linear(x)
        assert torch.equal(y, clean.linear(x)) and torch.isfinite(y).all()
        assert torch.allclose(y, reference.linear(x, weight.t(), None), rtol=1e-4, atol=1e-4)
        x[-1, int(skipped.nonzero()[0])] = 1e-30
        assert ColumnsMatrix(weight.t().contiguous()).linear(x)[-1].isnan().all()


@NATIVE
@pytest.mark.parametrize("isa", available())
def test_nan_in_x_is_no_zero(isa):
    x = torch.zeros(1, 40)
    x[0, 3] = NAN
    with instruction_set(isa):
        assert ColumnsMatrix(torch.randn(40, 9)).linear(x).isnan().all()


@NATIVE
def test_threads_do_not_change_a_bit_of_columns():
    weight, x, before, seen = torch.randn(300, 701), sparse_rows(1, 300, 0.5), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.append(ColumnsMatrix(weight).linear(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_what_the_kernel_does_not_take_is_the_dense_product(monkeypatch):
    weight, bias = torch.randn(7, 13), torch.randn(7)
    matrix = ColumnsMatrix(weight.t().contiguous())
    strided = torch.randn(13, 2).t()
    many = sparse_rows(40, 13, 0.5)
    for x in (strided, many, torch.randn(2, 3, 13), torch.zeros(0, 13), torch.randn(3, 26)[:, ::2]):
        assert torch.allclose(matrix.linear(x, bias), torch.nn.functional.linear(x, weight, bias), atol=1e-5)
    half = ColumnsMatrix(weight.t().contiguous().bfloat16())
    assert not half.fast and half.linear(many.bfloat16()).dtype == torch.bfloat16
    monkeypatch.setenv(SWITCH, "off")
    assert torch.allclose(ColumnsMatrix(matrix.values).linear(many, bias), torch.nn.functional.linear(many, weight, bias), atol=1e-5)
    x = torch.randn(1, 13, requires_grad=True)
    matrix.linear(x).sum().backward()
    assert torch.allclose(x.grad[0], weight.sum(0), atol=1e-5)


@NATIVE
def test_columns_from_python_are_checked():
    values, x = torch.randn(4, 3), torch.randn(1, 4)
    with pytest.raises(ValueError, match="null pointer"):
        native().columns_linear(0, 3, 4, pointer(x), 0, pointer(x), 1, 1)
    with pytest.raises(ValueError, match="rows and columns"):
        native().columns_linear(pointer(values), 0, 4, pointer(x), 0, pointer(x), 1, 1)


INTEGERS = ("int8", "int4", "int4-asymmetric")
ODD = ((1, 1), (7, 13), (64, 32), (65, 33), (130, 64), (576, 700), (2100, 40))


def by_columns(name, weight):
    """The matrix by rows and by columns of one layout's bytes, the latter with NaN and other bytes around all that it keeps."""
    shape, layout, twin = tuple(weight.shape), LAYOUTS[name], LAYOUTS[name + "-columns"]
    packed = layout.pack(weight)
    rows, columns = layout.matrix(packed, shape, torch.float32), twin.matrix(twin.turn(packed, shape, torch.float32), shape, torch.float32)
    scale, zero = (None if t is None else poisoned(t) for t in (columns.scale, columns.zero))
    return rows, GroupedColumnsMatrix(poisoned(columns.codes), scale, zero, shape, columns.bits)


def assert_is_rounded_product(y, x, matrix, bias):
    """Within float32 roundings of the product of the rounded x, relative to the terms that were added: |scale code| + |zero| each."""
    weight = matrix.dense()
    zero = matrix.scale.float() * 2 ** (matrix.bits - 1) if matrix.zero is None else matrix.zero.float().abs()
    parts = weight.abs() + 2 * zero.t()[: matrix.rows].repeat_interleave(32, 1)[:, : matrix.columns]
    assert_is_product(y, rounded(x), weight, bias, parts)


@NATIVE
@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_integer_columns_are_the_product_of_rounded_inputs(isa, name, density):
    with instruction_set(isa):
        for rows, columns in ODD:
            weight, bias = torch.randn(rows, columns), torch.randn(rows)
            weight[rows // 2] = 0.0
            by_rows, matrix = by_columns(name, weight)
            assert matrix.fast and torch.equal(matrix.dense(), by_rows.dense())
            for batch, threads in ((1, 1), (1, 2), (3, 2), (16, 1)):
                x = poisoned(sparse_rows(batch, columns, density, rows + batch))
                y = written(matrix, native().grouped_columns_linear, x, bias, threads)
                assert_is_rounded_product(y, x, matrix, bias)


@NATIVE
@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("name", INTEGERS)
def test_extreme_codes_do_not_overflow(isa, name):
    """The largest code in 31 columns of every group: 31 * 15 * 127 is more than 16 bits hold, 31 * 255 * 127 more than 8-bit products add up to."""
    weight = torch.full((70, 128), 7.0)
    weight[:, ::32] = -8.0
    x = torch.stack([torch.ones(128), -torch.ones(128)])
    with instruction_set(isa):
        _, matrix = by_columns(name, weight)
        assert_is_rounded_product(matrix.linear(x), x, matrix, None)


@NATIVE
@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("name", INTEGERS)
def test_codes_and_scales_of_skipped_columns_are_never_read(isa, name):
    weight, x = torch.randn(150, 160), sparse_rows(2, 160, 0.5)
    x[:, 64:96] = 0.0
    _, clean = by_columns(name, weight)
    live = (rounded(x) != 0).any(0)
    codes = codes_of(clean.codes, clean.bits)
    codes[:, ~live] ^= 255 if clean.bits == 8 else 15
    scale = clean.scale.clone()
    scale[2] = NAN
    spoilt = GroupedColumnsMatrix(columns_of(codes.contiguous(), clean.bits), scale, clean.zero, (150, 160), clean.bits)
    with instruction_set(isa):
        assert torch.equal(spoilt.linear(x[:1]), clean.linear(x[:1])) and torch.equal(spoilt.linear(x), clean.linear(x))
        x[0, 70] = 1.0
        assert not torch.equal(spoilt.linear(x[:1]), clean.linear(x[:1]))


@NATIVE
def test_threads_do_not_change_a_bit_of_integer_columns():
    _, matrix = by_columns("int4", torch.randn(700, 300))
    x, before, seen = sparse_rows(1, 300, 0.5), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.append(matrix.linear(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_columns_keep_what_rows_hold(name):
    weight = torch.randn(90, 70)
    weight[:, 32:64] = 0.0
    weight[3] = 0.0
    rows, columns = by_columns(name, weight)
    assert torch.equal(rows.dense(), columns.dense()) and not columns.dense()[3].any() and not columns.dense()[:, 32:64].any()
    many, bias = torch.randn(40, 70), torch.randn(90)
    assert torch.allclose(columns.linear(many, bias), torch.nn.functional.linear(many, rows.dense(), bias), atol=1e-5)
    assert columns.linear(torch.zeros(0, 70), bias).shape == (0, 90)


def test_integer_columns_that_do_not_fit_are_refused():
    _, matrix = by_columns("int4", torch.randn(70, 40))
    with pytest.raises(BadFile, match="70 x 80 by columns: it takes 3 groups of 2 strips"):
        GroupedColumnsMatrix(matrix.codes, matrix.scale, None, (70, 80), 4)
    if native() is not None:
        x = torch.randn(1, 70)
        codes, size, scale, zero, scales, *rest = matrix.arguments()
        with pytest.raises(ValueError, match="the codes or scales are not those of rows and columns"):
            native().grouped_columns_linear(codes, size - 32, scale, zero, scales, *rest, pointer(x), 0, pointer(x), 1, 1)
        with pytest.raises(ValueError, match="4 or 8 bits"):
            native().grouped_columns_linear(codes, size, scale, zero, scales, 70, 40, 5, pointer(x), 0, pointer(x), 1, 1)


@NATIVE
@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("name", INTEGERS)
def test_inputs_that_8_bits_cannot_scale_are_nan_or_nothing(isa, name):
    """A group of x with a NaN or an infinity has no scale; one of the tiniest numbers would have one that is infinite."""
    by_rows, columns = by_columns(name, torch.randn(70, 64))
    bias = torch.randn(70)
    with instruction_set(isa):
        for bad in (NAN, float("inf"), -float("inf")):
            x = torch.zeros(2, 64)
            x[0, 40] = bad
            assert rounded(x)[0, 32:].isnan().all() and not rounded(x)[1].any()
            for matrix in (by_rows, columns):
                y = matrix.linear(x, bias)
                assert y[0].isnan().all() and torch.equal(y[1], bias)
        tiny = torch.full((1, 64), 1e-40)
        assert not rounded(tiny).any()
        assert torch.equal(by_rows.linear(tiny, bias)[0], bias) and torch.equal(columns.linear(tiny, bias)[0], bias)
        assert_is_rounded_product(columns.linear(torch.full((1, 64), 2.0**-119)), torch.full((1, 64), 2.0**-119), columns, None)
