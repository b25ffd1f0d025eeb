"""The kernels of a mixture of experts against their references: odd shapes, every instruction set, poisoned memory, hostile metadata."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Generator, Tensor

from rarefy.core.errors import BadInput
from rarefy.kernels.experts import FEW, combine, linear, op, reference, sort
from rarefy.kernels.library import available, instruction_set, native, pointer
from tests.test_kernels import GUARD, NATIVE, assert_is_product, poisoned

NAN = float("nan")
SHAPES = ((1, 1, 1), (3, 7, 13), (5, 33, 64), (4, 4, 31), (2, 130, 300), (7, 64, 16))  # E, O, I
COUNTS = ((0,), (1,), (0, 2), (3, 0, 5), (1, 4, 6, 7), (13, 0, 0, 2), (9, 2, 30))  # rows of the first experts; the others get none


def mixtures(seed: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
    """(x, weight, ends, item or None, bias or None), with two assignments to nobody at the end of each."""
    g = Generator().manual_seed(seed)
    for experts, outputs, inputs in SHAPES:
        weight = torch.randn(experts, outputs, inputs, generator=g)
        for number, counts in enumerate(COUNTS):
            ends = torch.tensor([*counts, *[0] * experts][:experts]).cumsum(0)
            count = int(ends[-1]) + 2
            item = torch.randint(0, 4, (count,), generator=g) if number % 2 else None
            x = torch.randn(count if item is None else 4, inputs, generator=g)
            yield x, weight, ends, item, torch.randn(experts, outputs, generator=g) if number % 3 else None


def written(x: Tensor, weight: Tensor, ends: Tensor, item: Tensor | None, bias: Tensor | None, threads: int) -> Tensor:
    """The native product, with a check that nothing beside it was written."""
    (experts, outputs, inputs), count = weight.shape, len(x if item is None else item)
    room = torch.full((count * outputs + 2 * GUARD,), 7.0)
    y = room[GUARD : GUARD + count * outputs]
    native().experts_linear(pointer(weight), pointer(bias), experts, outputs, inputs, pointer(x), len(x), pointer(item), pointer(ends), count, pointer(y), threads)  # type: ignore[union-attr]
    assert (room[:GUARD] == 7).all() and (room[GUARD + y.numel() :] == 7).all()
    return y.view(count, outputs)


@NATIVE
@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("threads", [1, 2])
def test_every_expert_multiplies_its_own_rows(isa: str, threads: int) -> None:
    with instruction_set(isa):
        for x, weight, ends, item, bias in mixtures():
            y = written(poisoned(x), poisoned(weight), ends, item, None if bias is None else poisoned(bias), threads)
            torch.testing.assert_close(y, reference.linear(x, weight, ends, item, bias), atol=1e-4, rtol=1e-5)
            for e, span in reference.spans(ends):
                assert_is_product(y[span], x[span] if item is None else x[item[span]], weight[e], None if bias is None else bias[e])
            assert not y[int(ends[-1]) :].any(), "nobody's rows are zero"


@NATIVE
@pytest.mark.parametrize("isa", available())
def test_what_no_row_asks_for_is_never_read(isa: str) -> None:
    weight, x, item = torch.randn(4, 37, 50), torch.randn(6, 50), torch.tensor([1, 4, 4, 1, 5])
    ends = torch.tensor([2, 2, 4, 4])  # experts 1 and 3 have no rows, and the last assignment is nobody's
    with instruction_set(isa):
        clean = linear(x, weight, ends, item)
        weight[[1, 3]], x[[0, 2, 3, 5]] = NAN, NAN
        assert torch.equal(linear(x, weight, ends, item), clean) and torch.isfinite(clean).all()
        x[4, -1] = NAN
        assert linear(x, weight, ends, item).isnan().all(1).tolist() == [False, True, True, False, False]


@NATIVE
def test_threads_do_not_change_a_bit() -> None:
    x, weight, ends = torch.randn(40, 300), torch.randn(6, 520, 300), torch.tensor([3, 3, 20, 21, 30, 39])
    item, share = torch.arange(40).remainder(11), torch.rand(40)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = linear(x, weight, ends, item)
            seen.append((y, combine(y[:39], item, share, x[:11])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@NATIVE
@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("rows", [0, 1, 5, 70])
def test_assignments_are_sorted_and_summed_as_the_reference_does(isa: str, rows: int) -> None:
    g = Generator().manual_seed(rows)
    with instruction_set(isa):
        for experts, k, columns in ((1, 1, 1), (3, 2, 7), (8, 4, 33), (40, 3, 20)):
            x, share = torch.randn(rows, 5, generator=g), torch.rand(rows * k, generator=g)
            expert = torch.randint(0, experts + 1, (rows * k,), generator=g)
            item = torch.arange(rows).repeat_interleave(k)
            want = reference.sort(expert, item, share, experts)
            for given in (None, item):
                for got, expected in zip(sort(expert, given, poisoned(share), rows, experts), want, strict=True):
                    assert torch.equal(got, expected)
            y = torch.randn(int(want[3][-1]), columns, generator=g)
            torch.testing.assert_close(combine(poisoned(y), want[1], poisoned(want[2]), x), reference.combine(y, want[1], want[2], x), atol=1e-6, rtol=1e-6)


def test_what_the_kernels_do_not_take_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, ends, item = torch.randn(5, 6), torch.randn(3, 4, 6), torch.tensor([1, 1, 3]), torch.tensor([2, 0, 4, 1])
    monkeypatch.setattr(op, "native", lambda: pytest.fail("it went to the native side"))
    many = torch.arange(5).repeat(FEW)
    for args in (
        (x.double(), weight.double(), ends, item),
        (x.bfloat16(), weight.bfloat16(), ends, item),
        (x, weight.transpose(1, 2).contiguous().transpose(1, 2), ends, item),
        (x.t().contiguous().t(), weight, ends, item),
        (x, weight, ends.int(), item),
        (x, weight, torch.tensor([100, 100, 5 * FEW]), many),
        (x[:, :0], weight[:, :, :0], ends, item),
    ):
        assert torch.equal(linear(*args), reference.linear(*args))
    w = weight.clone().requires_grad_()
    linear(x, w, ends, item).sum().backward()
    torch.testing.assert_close(w.grad, torch.stack([x[2], 0 * x[0], x[0] + x[4]])[:, None].expand(3, 4, 6))
    y, share = torch.randn(3, 4, requires_grad=True), torch.rand(4)
    combine(y, item, share, x).sum().backward()
    torch.testing.assert_close(y.grad, share[:3, None].expand(3, 4))
    assert combine(y.detach().bfloat16(), item, share, x.bfloat16()).dtype == torch.bfloat16
    assert sort(torch.tensor([1, 0, 2, 0]), item, share.double(), 5, 2)[0].tolist() == [0, 0, 1, 2]


@NATIVE
@pytest.mark.parametrize(
    ("ends", "item", "words"),
    [
        ([1, 0, 3], [0, 1, 2], "do not ascend"),
        ([-1, 0, 3], [0, 1, 2], "do not ascend"),
        ([1, 2, 4], [0, 1, 2], "past the last assignment"),
        ([1, 2, 3], [5, 1, 2], "not a row of x"),
        ([1, 2, 3], [0, 5, 2], "not a row of x"),
        ([1, 2, 3], [0, 1, -1], "not a row of x"),
    ],
)
def test_a_product_that_would_reach_outside_is_refused(ends: list[int], item: list[int], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        linear(torch.randn(5, 6), torch.randn(3, 4, 6), torch.tensor(ends), torch.tensor(item))


@NATIVE
def test_sizes_and_pointers_from_python_are_checked() -> None:
    room, ends = torch.zeros(64), torch.zeros(64, dtype=torch.long)
    lib, floats, numbers = native(), pointer(room), pointer(ends)
    assert lib is not None
    for args, words in (
        ((0, 0, 2, 3, 4, floats, 2, numbers, numbers, 2, floats, 1), "null pointer"),
        ((floats + 1, 0, 2, 3, 4, floats, 2, numbers, numbers, 2, floats, 1), "not aligned"),
        ((floats, 0, 0, 3, 4, floats, 2, numbers, numbers, 2, floats, 1), "no experts"),
        ((floats, 0, 2, 0, 4, floats, 2, numbers, numbers, 2, floats, 1), "rows and columns"),
        ((floats, 0, 2, 3, 4, floats, 1, 0, numbers, 2, floats, 1), "past the rows of x"),
        ((floats, 0, 2, 3, 4, floats, 2, numbers, 0, 2, floats, 1), "null pointer"),
    ):
        with pytest.raises(ValueError, match=words):
            lib.experts_linear(*args)
    share = torch.ones(4)
    for expert, item, rows, words in (
        ([0, 3, 1, 0], [0, 0, 1, 1], 2, "0 .. E"),
        ([0, -1, 1, 0], [0, 0, 1, 1], 2, "0 .. E"),
        ([0, 2, 1, 0], [0, 0, 1, 2], 2, "not a row of x"),
        ([0, 2, 1, 0], None, 3, "as many assignments"),
        ([0, 2, 1, 0], None, 0, "as many assignments"),
    ):
        with pytest.raises(BadInput, match=words):
            sort(torch.tensor(expert), None if item is None else torch.tensor(item), share, rows, 2)
    for item in ([0, 1, 2, 0], [0, -1, 0, 0]):
        with pytest.raises(BadInput, match="not a row of x"):
            combine(torch.ones(4, 3), torch.tensor(item), share, torch.ones(2, 3))
    with pytest.raises(BadInput, match="not a row of x"):
        combine(torch.ones(1, 3), torch.tensor([0]), share[:1], torch.ones(0, 3))
