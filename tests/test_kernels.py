"""Native kernels against their references: odd shapes, every instruction set, poisoned memory, hostile metadata."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from rarefy.core.errors import BadFile
from rarefy.kernels.bitmask import BitmaskMatrix, reference
from rarefy.kernels.grouped import GroupedMatrix
from rarefy.kernels.grouped import reference as grouped
from rarefy.kernels.library import SWITCH, available, describe, instruction_set, native, pointer
from rarefy.kernels.samples import samples
from rarefy.layouts import LAYOUTS
from rarefy.layouts.bits import pack_bits

NATIVE = pytest.mark.skipif(native() is None, reason="the native kernels were not built here")
GUARD = 64  # floats of poison on either side
EXACT = {"rtol": 1e-5, "atol": 1e-5}


def test_native_kernels_are_built_where_they_are_required():
    if os.environ.get("RAREFY_REQUIRE_NATIVE"):
        assert native() is not None, describe()
        assert native().openmp()


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with NaN before and behind them in memory."""
    bytes_each = tensor.element_size()
    room = torch.full((tensor.numel() + 2 * GUARD * 4 // bytes_each,), 255 if tensor.dtype == torch.uint8 else float("nan"), dtype=tensor.dtype)
    inside = room[GUARD * 4 // bytes_each :][: tensor.numel()]
    inside.copy_(tensor.reshape(-1))
    return inside.view(tensor.shape)


def assert_is_product(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, parts: torch.Tensor | None = None) -> None:
    """Within ``(8 + 2 sqrt(I)) 2^-24`` of the float64 product, relative to the terms that were added (they may cancel).

    Half a rounding for each of I additions in a row would be ``I 2^-24``; roundings that point either way grow with the root.
    `parts` bounds the weights where a kernel adds them as several terms: |scale code| + |zero|.
    """
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    terms = F.linear(x.double().abs(), (weight if parts is None else parts).double().abs(), None if bias is None else bias.double().abs())
    roundings = 8 + 2 * x.shape[1] ** 0.5
    assert y.shape == exact.shape and (y.double() - exact).abs().le(roundings * 2**-24 * terms).all()


def packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    mask = F.pad(weight != 0, (0, -columns % 8)).view(rows, -1, 8)
    return (mask * torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)).sum(-1, dtype=torch.uint8), weight[weight != 0]


@NATIVE
@pytest.mark.parametrize("isa", available())
def test_bitmask_equals_its_reference(isa):
    with instruction_set(isa):
        for weight, x, bias in samples():
            bits, values = packed(weight)
            matrix = BitmaskMatrix(poisoned(bits), poisoned(values), weight.shape[1])
            assert matrix.fast
            assert torch.equal(matrix.dense(), weight)
            y = matrix.linear(poisoned(x), None if bias is None else poisoned(bias))
            assert torch.equal(reference.unpack(bits, values, weight.shape[1]), weight)
            assert_is_product(y, x, weight, bias)


@NATIVE
@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("threads", [1, 2])
def test_dense_equals_torch_and_writes_only_its_output(isa, threads):
    with instruction_set(isa):
        for weight, x, bias in samples():
            weight, x = poisoned(weight), poisoned(x)
            room = torch.full((x.shape[0] * weight.shape[0] + 2 * GUARD,), 7.0)
            y = room[GUARD : GUARD + x.shape[0] * weight.shape[0]]
            native().dense_linear(pointer(weight), *weight.shape, pointer(x), pointer(bias), pointer(y), x.shape[0], threads)
            assert_is_product(y.view(len(x), len(weight)), x, weight, bias)
            assert (room[:GUARD] == 7).all() and (room[GUARD + y.numel() :] == 7).all()


@NATIVE
def test_threads_do_not_change_a_bit():
    weight = torch.randn(700, 300) * (torch.rand(700, 300) < 0.5)
    matrix, x = BitmaskMatrix(*packed(weight), 300), torch.randn(1, 300)
    one, before = None, torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = matrix.linear(x)
            one = y if one is None else one
            assert torch.equal(y, one)
    finally:
        torch.set_num_threads(before)


@NATIVE
def test_hostile_metadata_is_refused_before_a_pointer_is_used():
    bits, values = torch.tensor([[7]], dtype=torch.uint8), torch.ones(3)
    with pytest.raises(BadFile, match="ask for 3 values and it holds 2"):
        BitmaskMatrix(bits, values[:2], 3)
    with pytest.raises(BadFile, match="past the last column"):
        BitmaskMatrix(bits, values, 2)
    with pytest.raises(ValueError, match="shorter than rows"):
        native().bitmask_starts(pointer(bits), 1, pointer(torch.empty(3, dtype=torch.int64)), 2, 3)
    with pytest.raises(ValueError, match="null pointer"):
        native().dense_linear(0, 1, 1, pointer(values), 0, pointer(values), 1, 1)
    with pytest.raises(ValueError, match="rows and columns"):
        native().dense_linear(pointer(values), 0, 1, pointer(values), 0, pointer(values), 1, 1)
    with pytest.raises(ValueError, match="not aligned"):
        native().dense_linear(pointer(values) + 1, 1, 1, pointer(values), 0, pointer(values), 1, 1)
    with pytest.raises(ValueError, match="not in this build"):
        native().use("sse9")


@NATIVE
def test_other_dtypes_strides_and_gradients_take_the_reference():
    weight = torch.randn(6, 20) * (torch.rand(6, 20) < 0.5)
    matrix = BitmaskMatrix(*packed(weight), 20)
    x = torch.randn(20, 3).t()
    torch.testing.assert_close(matrix.linear(x), F.linear(x, weight), **EXACT)
    torch.testing.assert_close(matrix.linear(x.double()), F.linear(x.double(), weight.double()))
    live = torch.randn(2, 20, requires_grad=True)
    matrix.linear(live).sum().backward()
    torch.testing.assert_close(live.grad, weight.sum(0).expand(2, 20))
    half = BitmaskMatrix(packed(weight)[0], packed(weight)[1].bfloat16(), 20)
    assert not half.fast and torch.equal(half.dense(), weight.bfloat16())


@NATIVE
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"n_m_g"}))
def test_derivatives_that_no_tensor_tells_of_are_not_lost(layout):
    chosen, weight = LAYOUTS[layout], torch.randn(8, 64) * torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(16)  # two of four, and as many in every row
    packed = chosen.pack(weight)
    weight, matrix = chosen.unpack(packed, (8, 64), torch.float32), chosen.matrix(packed, (8, 64), torch.float32)
    x, t = torch.randn(3, 64), torch.randn(3, 64)
    want = t @ weight.T
    torch.testing.assert_close(torch.func.jvp(matrix.linear, (x,), (t,))[1], want)
    torch.testing.assert_close(torch.func.vmap(matrix.linear)(x), x @ weight.T)
    torch.testing.assert_close(torch.func.grad(lambda x: matrix.linear(x).sum())(x), weight.sum(0).expand(3, 64))
    with forward_ad.dual_level():
        torch.testing.assert_close(forward_ad.unpack_dual(matrix.linear(forward_ad.make_dual(x, t))).tangent, want)


def test_compiled_code_takes_the_reference_without_a_break():
    weight = torch.randn(6, 20) * (torch.rand(6, 20) < 0.5)
    matrix, x = BitmaskMatrix(*packed(weight), 20), torch.randn(2, 20)
    run = torch.compile(lambda x: matrix.linear(x), fullgraph=True, backend="eager")
    torch.testing.assert_close(run(x), matrix.linear(x), **EXACT)


def test_switched_off_means_pytorch(monkeypatch):
    monkeypatch.setenv(SWITCH, "off")
    assert native() is None and describe().startswith("PyTorch only")
    weight = torch.randn(6, 20) * (torch.rand(6, 20) < 0.5)
    matrix = BitmaskMatrix(*packed(weight), 20)
    assert not matrix.fast
    torch.testing.assert_close(matrix.linear(torch.ones(1, 20))[0], weight.sum(1), **EXACT)


@NATIVE
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads /proc")
def test_one_openmp_runtime_in_the_process():
    code = """
import torch
from rarefy.kernels.library import native
y = torch.randn(300, 300) @ torch.randn(300, 300)
lines = {line.split()[-1] for line in open("/proc/self/maps") if any(n in line for n in ("libgomp", "libiomp", "libomp"))}
print(len(lines), native().isa())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == "1"


def grouped_case(weight, bits, asymmetric, keep, generator):
    """Random codes and scales of the shape of `weight`, the groups of `keep` [O, G] stored."""
    stored = int(keep.sum())
    codes = torch.randint(0, 256, (stored, 32 * bits // 8), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(stored, generator=generator) + 0.01).half()
    zero = torch.randn(stored, generator=generator).half() if asymmetric else None
    return codes, scale, zero


@NATIVE
@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_grouped_equals_its_reference(isa, bits, asymmetric):
    generator = torch.Generator().manual_seed(bits)
    with instruction_set(isa):
        for weight, x, bias in samples():
            groups = -(-weight.shape[1] // 32)
            for share in (0.4, 1.1):
                keep = torch.rand(weight.shape[0], groups, generator=generator) < share
                keep[0, 0] = True
                present = pack_bits(keep)
                codes, scale, zero = grouped_case(weight, bits, asymmetric, keep, generator)
                matrix = GroupedMatrix(poisoned(codes), poisoned(scale), None if zero is None else poisoned(zero), present, weight.shape[1], bits)
                assert matrix.fast and (matrix.skips is None) == bool(keep.all())
                y = matrix.linear(poisoned(x), bias)
                offset = scale.float() * 2 ** (bits - 1) if zero is None else zero.float().abs()
                largest = torch.full_like(codes, 255)
                parts = grouped.unpack(largest, scale, offset, present, weight.shape[1], bits)  # kernels may centre the codes differently
                assert_is_product(y, grouped.rounded(x), matrix.dense(), bias, parts)


@NATIVE
def test_grouped_refuses_codes_that_do_not_add_up():
    with pytest.raises(BadFile, match="2 groups are present"):
        GroupedMatrix(torch.zeros(1, 16, dtype=torch.uint8), torch.ones(1).half(), None, torch.ones(2, 1, dtype=torch.uint8), 32, 4)
