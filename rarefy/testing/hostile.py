"""Hostile bytes through a layout: what a file may hold is refused with one sentence, or it computes what it says.

`report(1000)` runs so many cases over every layout and prints what was accepted and refused; under the address and
undefined-behaviour sanitizers (`make sanitize`) a read past the bytes ends it. A case is its layout and its number alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from rarefy.core.errors import BadFile
from rarefy.core.roles import Layout, Rows
from rarefy.kernels.dense import DenseMatrix
from rarefy.kernels.library import SWITCH, available, describe, instruction_set, native
from rarefy.layouts import LAYOUTS
from rarefy.runtime.decoder import LINEARS, Block, Decoder, Sizes
from rarefy.runtime.sieves import Sieve
from rarefy.testing.contract import contract

SHAPES = ((1, 1), (2, 3), (7, 13), (16, 64), (9, 100), (64, 33), (33, 129), (70, 40), (4, 300), (1, 257), (260, 2))
CASES = 40  # of the contract
LARGE = ((2**31 - 1, 2**31 - 1), (2**31 - 1, 1), (1, 2**31 - 1), (2**16 + 1, 2**16 + 1), (1, 2**16 + 1))
TYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
BATCHES = (1, 2, 3, 5, 9, 17, 70)
BYTES = (0, 1, 2, 3, 4, 8, 127, 128, 254, 255)
ROOM = 2**22  # entries of a matrix that is computed with; a few bytes may hold a larger one, all zero
MOST = 1e30  # sums of larger terms may pass what float32 holds
WIDEST = 1e20  # and so may those of codes and zeros that cancel, times larger inputs


@dataclass(frozen=True)
class Case:
    """What a folder may say about one tensor: its bytes, and the shape and dtype in the plan."""

    packed: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype


@dataclass(frozen=True)
class Outcome:
    """Whether the bytes were accepted, what went wrong (empty where nothing did) and how long it took."""

    accepted: bool
    wrong: str
    seconds: float


def case(layout: Layout, number: int) -> Case:
    """The case of this number: the bytes of a random matrix, as they are or spoilt."""
    generator = Generator().manual_seed(number)
    shape, dtype = _one(SHAPES, generator), _one(TYPES, generator)
    weight = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < _one((0.0, 0.05, 0.5, 0.5, 1.0), generator))
    whole = Case(layout.pack(weight.to(dtype)), shape, dtype)
    spoilt = whole
    for _ in range(_one((0, 1, 1, 1, 2), generator)):
        spoilt = _one(SPOIL, generator)(spoilt, generator)
    return Case(_placed(spoilt.packed, _one((0, 0, 1, 2, 4), generator)), spoilt.shape, spoilt.dtype)


def outcome(layout: Layout, number: int) -> Outcome:
    """Check and compute one case, on the instruction sets in turn."""
    began, given, sets = time.monotonic(), case(layout, number), available()
    accepted, wrong = False, ""
    with instruction_set(sets[number % len(sets)]) if sets else nullcontext():
        try:
            layout.check(given.packed, given.shape, given.dtype, "w")
            accepted = True
            wrong = _computes(layout, given, number) if given.shape[0] * given.shape[1] <= ROOM else ""
        except BadFile as error:
            wrong = f"accepted, and then: {error}" if accepted else ""
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
    return Outcome(accepted, wrong, time.monotonic() - began)


def survey(layouts: dict[str, Layout], count: int, first: int = 0) -> dict[str, Any]:
    """So many cases over all layouts: {layouts: {name: {accepted, refused}}, slowest_s, wrong: [what, at most ten]}."""
    found: dict[str, Any] = {"layouts": {name: {"accepted": 0, "refused": 0} for name in layouts}, "slowest_s": 0.0, "wrong": []}
    for number in range(first, first + count):
        name = list(layouts)[number % len(layouts)]
        seen = outcome(layouts[name], number)
        found["layouts"][name]["accepted" if seen.accepted else "refused"] += 1
        found["slowest_s"] = max(found["slowest_s"], round(seen.seconds, 3))
        if seen.wrong and len(found["wrong"]) < 10:
            found["wrong"].append(f"{name}, case {number}: {seen.wrong}")
    return found


@contract(Layout)
def hostile_bytes_are_refused_or_computed(part: Layout) -> None:
    for number in range(CASES):
        wrong = outcome(part, number).wrong
        assert not wrong, f"{part!r}, case {number}: {wrong}"


def _one(values: Any, generator: Generator) -> Any:
    return values[int(torch.randint(len(values), (), generator=generator))]


def _placed(packed: Tensor, offset: int) -> Tensor:
    """The same bytes at the end of a piece of memory of their own, as far from its beginning: a mapped file begins anywhere."""
    room = torch.empty(packed.numel() + offset, dtype=torch.uint8)
    room[offset:] = packed
    return room[offset:]


def _some_bytes(given: Case, generator: Generator) -> Case:
    packed = given.packed.clone()
    for at in torch.randint(max(1, packed.numel()), (int(_one((1, 2, 8), generator)),), generator=generator).tolist():
        packed[at : at + 1] = _one(BYTES, generator)
    return Case(packed, given.shape, given.dtype)


def _section(given: Case, generator: Generator) -> Case:
    """A number at the beginning of a section, where heads, counts and bits lie."""
    packed = given.packed.clone()
    at = 64 * _one((0, 0, 1, 2), generator)
    number = torch.tensor([_one((0, 1, -1, 2, 255, 256, 65535, 65536, 2**31 - 1, -(2**31)), generator)], dtype=torch.int32).view(torch.uint8)
    packed[at : at + 4] = number[: packed[at : at + 4].numel()]
    return Case(packed, given.shape, given.dtype)


def _run_of_one(given: Case, generator: Generator) -> Case:
    packed = given.packed.clone()
    at, length = int(torch.randint(max(1, packed.numel()), (), generator=generator)), _one((4, 64, 10**6), generator)
    packed[at : at + length] = _one((0, 255, 127, 128), generator)
    return Case(packed, given.shape, given.dtype)


def _noise(given: Case, generator: Generator) -> Case:
    return Case(torch.randint(256, given.packed.shape, dtype=torch.uint8, generator=generator), given.shape, given.dtype)


def _tail(given: Case, generator: Generator) -> Case:
    """Noise in the last third: values, codes and what lies beside them."""
    packed = given.packed.clone()
    tail = packed[packed.numel() * 2 // 3 :]
    tail.copy_(torch.randint(256, tail.shape, dtype=torch.uint8, generator=generator))
    return Case(packed, given.shape, given.dtype)


def _length(given: Case, generator: Generator) -> Case:
    change = _one((-(10**6), -64, -1, 1, 64, 128), generator)
    packed = given.packed[: max(0, given.packed.numel() + change)] if change < 0 else torch.cat([given.packed, torch.zeros(change, dtype=torch.uint8)])
    return Case(packed, given.shape, given.dtype)


def _other_shape(given: Case, generator: Generator) -> Case:
    rows, columns = given.shape
    return Case(
        given.packed, _one(((columns, rows), (rows + 1, columns), (rows, columns + 1), (max(1, rows - 1), columns), (rows, max(1, columns - 1)), *LARGE), generator), given.dtype
    )


def _other_type(given: Case, generator: Generator) -> Case:
    return Case(given.packed, given.shape, _one(TYPES, generator))


SPOIL: tuple[Callable[[Case, Generator], Case], ...] = (_some_bytes, _some_bytes, _section, _section, _run_of_one, _noise, _tail, _length, _other_shape, _other_type)


def _computes(layout: Layout, given: Case, number: int) -> str:
    """What of an accepted case is not the product of what its bytes say; empty where all is."""
    generator = Generator().manual_seed(number)
    with _switched_off():
        reference = layout.matrix(given.packed, given.shape, given.dtype).dense()
    matrix = layout.matrix(given.packed, given.shape, given.dtype)
    if not _same(matrix.dense(), reference):
        return "the matrix in native code is not that in PyTorch"
    for batch in (1, _one(BATCHES, generator)):
        x, bias = torch.randn(batch, given.shape[1], generator=generator), torch.randn(given.shape[0], generator=generator)
        if number % 7 == 0:
            x[-1, int(torch.randint(given.shape[1], (), generator=generator))] = _one((float("nan"), float("inf"), -3e38, 1e-45), generator)
        if not _product(matrix.linear(x, bias), x, reference, bias, layout.lossless):
            return f"the product with {batch} rows is not the dense one"
    if isinstance(matrix, Rows):
        ids = torch.randint(given.shape[0], (3,), generator=generator)
        if not _same(matrix.take(ids), reference[ids]):
            return "single rows are not those of the matrix"
    if native() is not None and given.dtype == torch.float32 and getattr(matrix, "fast", False) and hasattr(native().Decoder, getattr(matrix, "kind", "")):  # type: ignore[union-attr]
        return _decodes(matrix, generator)
    return ""


@contextmanager
def _switched_off() -> Iterator[None]:
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "off"
    try:
        yield
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN where the other is; a layout may add to zero, so that the sign of one does not count."""
    return a.shape == b.shape and torch.equal(a.nan_to_num(1.5, 2.5, 3.5), b.nan_to_num(1.5, 2.5, 3.5)) and torch.equal(a.isnan(), b.isnan())


def _product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, lossless: bool) -> bool:
    """Whether y is x W^T + b, W in the dtype of y, where every term is a number that sums can hold; elsewhere only that it is there."""
    weight = weight.to(y.dtype)
    terms = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    exact = F.linear(x.double(), weight.double(), bias.double())
    held = (terms < MOST) & (lossless | (x.double().abs().amax(1, keepdim=True) < WIDEST))
    rounding = 0.1 if y.dtype.itemsize == 2 else 1e-5 if lossless else 0.05
    return y.shape == exact.shape and bool(((y.double() - exact).abs() <= rounding * (terms + weight.double().abs().amax(1) * x.double().abs().amax(1, keepdim=True)))[held].all())


def _decodes(matrix: Any, generator: Generator) -> str:
    """Two steps of a decoder of one layer whose q, k, v, gate, up and head are this matrix, where its shape allows."""
    rows, hidden = matrix.rows, matrix.columns
    heads = rows % 2 == 0
    q = rows if heads else 2
    sizes = Sizes(hidden, rows, 1, 1, q, rows, 1, 8, 1e-5)

    def dense(*shape: int) -> Any:
        return DenseMatrix(torch.randn(shape, generator=generator))

    linears = dict.fromkeys(LINEARS, (matrix, None))
    linears |= {"o": (dense(hidden, q), None), "down": (dense(hidden, rows), None)}
    if not heads:
        linears |= {name: (dense(q, hidden), None) for name in ("q", "k", "v")}
    gates = _one(({}, {"up": Sieve(threshold=torch.tensor([0.5]))}, {"units": Sieve(threshold=torch.tensor([0.1]))}, {"units": Sieve(keep=1, block=rows)}), generator)
    gain, angle = torch.ones(hidden), torch.rand(8, q // 2, generator=generator)
    decoder = Decoder(sizes, [Block(linears, gain, gain, gates)], dense(rows, hidden), gain, matrix, angle.cos(), angle.sin())
    cache = decoder.cache(2)
    for length in (3, 1):
        logits = decoder.step(torch.randint(rows, (2, length), generator=generator), cache)
        if logits.shape != (2, length, rows):
            return f"a step of the decoder gives {tuple(logits.shape)}"
    return ""


def report(count: int, first: int = 0) -> int:
    """Print `survey` over every layout as one line of JSON; 1 where something went wrong."""
    began = time.monotonic()
    found = survey(LAYOUTS, count, first)
    print(json.dumps({"cases": count, "seconds": round(time.monotonic() - began, 1), "kernels": describe(), **found}))
    return bool(found["wrong"])
