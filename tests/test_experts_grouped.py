"""The registered ops of a bank against the loop over experts: values, gradients, second derivatives, autocast, the compiler's own checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._functorch.config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from rarefy.core.errors import BadInput
from rarefy.core.records import Routing, Rows
from rarefy.experts.banks.glu import GLU
from rarefy.experts.dispatch import Backend, dispatch, fused, gather, loop
from rarefy.experts.grouped import _linear, _outer, grouped_linear
from rarefy.experts.moe import MoE
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.topk import TopK
from rarefy.experts.split import Split

NOBODY = {"all to nobody": [4, 4, 4, 4], "no rows": [], "one expert": [2, 2, 2, 2], "empty ones between": [0, 3, 3, 4, 0, 4], "mixed": [3, 1, 0, 2, 4, 1]}


def results(bank: GLU, x: Tensor, routing: Routing, backend: Backend) -> list[Tensor]:
    x, w = x.clone().requires_grad_(), routing.weight.clone().requires_grad_()
    bank.zero_grad()
    y = dispatch(x, Routing(routing.expert, w, routing.items, routing.experts, routing.k), bank, backend=backend)
    (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()).sum().backward()
    return [y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in (x, w, bank.gate_up_proj, bank.down_proj))]


@pytest.mark.parametrize("expert", NOBODY.values(), ids=NOBODY)
@pytest.mark.parametrize("backend", [fused, gather])
def test_back_ends_equal_the_loop(expert: list[int], backend: Backend) -> None:
    bank, rows = GLU(4, 5, 3), len(expert) // 2
    routing = Routing(torch.tensor(expert, dtype=torch.long), torch.rand(len(expert)), rows, 4, 2)
    x = torch.randn(rows, 5)
    for got, want in zip(results(bank, x, routing, backend), results(bank, x, routing, loop), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(0, 40), experts=st.integers(1, 9), k=st.integers(1, 3))
def test_fused_equals_the_loop(seed: int, rows: int, experts: int, k: int) -> None:
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    bank = GLU(experts, 5, 3)
    routing = Routing(torch.randint(0, experts + 1, (rows * k,), generator=g), torch.rand(rows * k, generator=g), rows, experts, k)
    x = torch.randn(rows, 5, generator=g)
    for got, want in zip(results(bank, x, routing, fused), results(bank, x, routing, loop), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


CASES = [
    pytest.param([2, 2, 5], None, id="an empty expert, a row beyond"),
    pytest.param([0, 0, 0], None, id="nobody"),
    pytest.param([1, 3, 4], [2, 0, 1, 0, 2, 1], id="gathered"),
]


def operands(offsets: list[int], item: list[int] | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    rows = 6 if item is None else 3
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((rows, 3), (3, 2, 3), (3, 2)))
    return x, weight, bias, torch.tensor(offsets), None if item is None else torch.tensor(item)


@pytest.mark.parametrize(("offsets", "item"), CASES)
def test_first_and_second_derivatives(offsets: list[int], item: list[int] | None) -> None:
    x, weight, bias, ends, rows = operands(offsets, item)

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return grouped_linear(x, weight, ends, item=rows, bias=bias)

    assert torch.autograd.gradcheck(f, (x, weight, bias))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias))


@pytest.mark.parametrize(("offsets", "item"), CASES)
def test_the_ops_keep_the_compilers_rules(offsets: list[int], item: list[int] | None) -> None:
    x, weight, bias, ends, rows = operands(offsets, item)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_linear, (x, weight, bias, rows, ends), test_utils=checks)
    torch.library.opcheck(_outer, (torch.randn(6, 2, dtype=torch.float64), x, rows, ends), test_utils=checks)


def test_transposed_weights_and_frozen_ones() -> None:
    x, weight, ends = torch.randn(5, 3, requires_grad=True), torch.randn(2, 3, 4), torch.tensor([2, 5])
    y = grouped_linear(x, weight.transpose(1, 2), ends)
    want = torch.cat([x[:2] @ weight[0], x[2:] @ weight[1]])
    torch.testing.assert_close(y, want)
    for got, expected in zip(torch.autograd.grad(y.sum(), x), torch.autograd.grad(want.sum(), x), strict=True):
        torch.testing.assert_close(got, expected)


def test_autocast_computes_in_the_type_of_the_loop() -> None:
    bank, x = GLU(3, 8, 4), torch.randn(6, 8)
    routing = Routing(torch.tensor([0, 2, 2, 1, 0, 3]), torch.ones(6), 6, 3, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = (dispatch(x, routing, bank, backend=b) for b in (fused, loop))
        assert grouped_linear(x, bank.gate_up_proj, torch.tensor([2, 4, 6])).dtype == torch.bfloat16
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)
    assert not torch.equal(got, dispatch(x, routing, bank, backend=loop))


@pytest.mark.skipif(not hasattr(torch._functorch.config, "backward_pass_autocast"), reason="this torch cannot run a compiled backward without autocast")
def test_a_compiled_layer_under_autocast_equals_eager() -> None:
    torch._dynamo.reset()
    moe, x = MoE(Linear(8, 3), TopK(2), GLU(3, 8, 4)), torch.randn(6, 8)
    call: Any = torch.compile(moe, backend="aot_eager", fullgraph=True)
    # By default the compiler runs the whole backward under the forward's autocast, the float32 router's too.
    with torch.autocast("cpu", dtype=torch.bfloat16), torch._functorch.config.patch(backward_pass_autocast="off"):
        got, want = call(x), moe(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(y.sum(), list(moe.parameters())) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_only_the_experts_that_run_are_made() -> None:
    made: list[int] = []

    class Counts(GLU):
        def split(self) -> Split:
            whole = super().split()
            return Split(self.experts, lambda e: made.append(e) or whole[e])  # type: ignore[func-returns-value]

    routing = Routing(torch.tensor([7, 2, 9, 2]), torch.ones(4), 4, 9, 1)
    dispatch(torch.ones(4, 5), routing, Counts(9, 5, 3))
    assert made == [2, 7]
    whole = GLU(3, 5, 3).split()
    assert len(whole) == 3 and len(whole[1:]) == 2 and len(list(whole)) == 3
    with pytest.raises(IndexError):
        whole[3]


def test_one_gradient_reaches_a_fused_tensor_not_one_per_expert() -> None:
    bank, x = GLU(64, 4, 3), torch.randn(40, 4)
    routing = Routing(torch.arange(40), torch.ones(40), 40, 64, 1)
    y = dispatch(x, routing, bank)
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [n for n, _ in node.next_functions]
    names = [type(n).__name__ for n in seen]
    assert names.count("UnbindBackward0") == 2 and "SelectBackward0" not in names


class OnlySplit:
    """A bank that has no grouped computation."""

    experts = 1

    def split(self) -> list[Callable[[Tensor], Tensor]]:
        return [F.relu]

    def each(self, x: Tensor, expert: Tensor) -> Tensor:
        return F.relu(x)


def test_a_bank_without_the_op_is_refused_by_name_and_served_by_the_loop() -> None:
    routing: Any = Routing(torch.zeros(2, dtype=torch.long), torch.ones(2), 2, 1, 1)
    with pytest.raises(BadInput, match="OnlySplit in one op"):
        dispatch(torch.ones(2, 2), routing, OnlySplit(), backend=fused)
    assert torch.equal(dispatch(torch.ones(2, 2), routing, OnlySplit()), torch.ones(2, 2))


class Shifted(GLU):
    """Experts that do not map zero to zero."""

    def split(self) -> list[Callable[[Tensor], Tensor]]:
        return [lambda x, f=f: f(x) + 1 for f in super().split()]

    def grouped(self, rows: Rows) -> Tensor:
        return super().grouped(rows) + 1


def test_nobodys_rows_are_zero_whatever_the_experts_add() -> None:
    bank, x = Shifted(3, 5, 3), torch.randn(4, 5)
    routing = Routing(torch.tensor([3, 1, 3, 0]), torch.ones(4), 4, 3, 1)
    got, want = (dispatch(x, routing, bank, backend=b) for b in (fused, loop))
    torch.testing.assert_close(got, want)
    assert not got[[0, 2]].any()
