"""The contract of a Layout: bytes that come back, that compute what the dense matrix does, and that are refused when they are not whole."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from rarefy.core.errors import BadFile
from rarefy.core.roles import Layout, Rows
from rarefy.testing.contract import contract

SHAPES = ((1, 1), (7, 13), (16, 64), (9, 100))


def _weight(rows: int, columns: int, density: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) >= density] = 0.0
    weight[rows // 2] = 0.0
    return weight


@contract(Layout)
def comes_back(part: Layout) -> None:
    for rows, columns in SHAPES:
        for density in (0.0, 0.3, 1.0):
            weight = _weight(rows, columns, density)
            packed = part.pack(weight)
            part.check(packed, (rows, columns), weight.dtype, "w")
            assert packed.dtype == torch.uint8 and packed.dim() == 1 and packed.numel() % 64 == 0, f"{part!r}: packed to {packed.dtype} {tuple(packed.shape)}"
            assert packed.numel() <= part.size((rows, columns), int((weight != 0).sum()), weight.dtype), f"{part!r}: {packed.numel()} bytes are more than size says"
            back = part.unpack(packed, (rows, columns), weight.dtype)
            assert back.dtype == weight.dtype and back.shape == weight.shape
            if part.lossless:
                assert torch.equal(back, weight), f"{part!r}: {rows} x {columns} at density {density} came back changed"
            else:
                error = (back - weight).norm() / weight.norm().clamp_min(1e-9)
                assert error < 0.2, f"{part!r}: relative error {error:.3f} at {rows} x {columns}"
                assert not back[rows // 2].any(), f"{part!r}: a row of zeros came back with other values"
            assert torch.equal(part.pack(back), part.pack(part.unpack(part.pack(back), (rows, columns), weight.dtype))), f"{part!r}: packing again changes the bytes"


@contract(Layout)
def computes_what_the_dense_matrix_does(part: Layout) -> None:
    for rows, columns in SHAPES:
        for density in (0.0, 0.5):  # of nothing stored the product is the bias
            weight = _weight(rows, columns, density)
            matrix = part.matrix(part.pack(weight), (rows, columns), weight.dtype)
            for how, x in _inputs(columns):
                for bias in (torch.randn(rows), None):
                    want = F.linear(x, matrix.dense(), bias)
                    got = matrix.linear(x, bias)
                    assert got.shape == want.shape and got.dtype == want.dtype
                    close = torch.allclose(got, want, rtol=1e-4, atol=1e-4) if part.lossless else (got - want).norm() <= 0.02 * (want.norm() + weight.norm())
                    assert close, f"{part!r}: {rows} x {columns} at density {density}, x {how}: linear is not the dense product"


def _inputs(columns: int) -> list[tuple[str, torch.Tensor]]:
    whole = {f"{list(shape)}": torch.randn(*shape, columns) for shape in ((), (0,), (1,), (3,), (2, 0, 3), (2, 20))}
    strided = {"transposed": torch.randn(columns, 3).t(), "every other column": torch.randn(3, 2 * columns)[:, ::2], "every other row": torch.randn(5, columns)[::2]}
    return [*whole.items(), *strided.items(), ("expanded", torch.randn(1, columns).expand(3, -1)), ("at an odd address", torch.randn(2 * columns + 1)[1:].view(2, columns))]


@contract(Layout)
def gradients_are_those_of_the_dense_matrix(part: Layout) -> None:
    for rows, columns in SHAPES:
        weight = _weight(rows, columns, 0.5)
        matrix = part.matrix(part.pack(weight), (rows, columns), weight.dtype)
        for x in (torch.randn(2, columns), torch.randn(columns, 2).t(), torch.randn(0, columns)):
            live, g = x.clone().requires_grad_(), torch.randn(len(x), rows)
            matrix.linear(live).backward(g)
            assert live.grad is not None and torch.allclose(live.grad, g @ matrix.dense(), rtol=1e-4, atol=1e-4), f"{part!r}: {rows} x {columns}: the gradient is not g W"


@contract(Layout)
def single_rows_are_those_of_the_dense_matrix(part: Layout) -> None:
    for rows, columns in SHAPES:
        weight = _weight(rows, columns, 0.5)
        matrix = part.matrix(part.pack(weight), (rows, columns), weight.dtype)
        if isinstance(matrix, Rows):
            for ids in (torch.tensor([[rows - 1, 0], [rows // 2, 0]]).t(), torch.zeros(0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long), torch.tensor(rows - 1)):
                assert torch.equal(matrix.take(ids), matrix.dense()[ids]), f"{part!r}: {rows} x {columns}, rows {ids.tolist()} are not those of the dense matrix"


@contract(Layout)
def what_is_not_whole_is_refused(part: Layout) -> None:
    weight = _weight(9, 100, 0.5)
    packed = part.pack(weight)
    for broken in (packed[:-64], packed[:5], torch.cat([packed, packed[:64]]), packed.view(-1, 1), packed.to(torch.int16)):
        _must_refuse(part, broken)
    for byte in (0, 12):
        flipped = packed.clone()
        flipped[byte] ^= 255
        try:
            part.check(flipped, (9, 100), weight.dtype, "w")
        except BadFile:
            continue
        part.matrix(flipped, (9, 100), weight.dtype).linear(torch.ones(1, 100))  # accepted: then it must be safe to compute with


def _must_refuse(part: Layout, broken: torch.Tensor) -> None:
    try:
        part.check(broken, (9, 100), torch.float32, "w")
    except BadFile:
        return
    raise AssertionError(f"{part!r} accepts {broken.dtype} {tuple(broken.shape)} for a 9 x 100 matrix")
