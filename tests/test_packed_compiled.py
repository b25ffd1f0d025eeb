"""Packed layers in compiled code: one graph without a break, the native kernel inside it, few compilations."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from rarefy.hub.packed import PackedConv1D, PackedEmbedding, PackedLinear
from rarefy.hub.plan import Layer
from rarefy.kernels.library import native
from rarefy.layouts import LAYOUTS, ops

SHAPE = (24, 70)
ROWS = [name for name in LAYOUTS if name in ("flat", "int8", "int4", "int4-asymmetric")]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def packed(kind: Any, layout: str, bias: bool = True, shape: tuple[int, int] = SHAPE, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.4)
    data = LAYOUTS[layout].pack(weight)
    return kind(Layer.of(weight, data, layout), data, nn.Parameter(torch.randn(shape[0], generator=generator)) if bias else None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_graph_gives_what_eager_gives(layout: str) -> None:
    layer, count = packed(PackedLinear, layout), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    with torch.no_grad():
        for batch in (1, 3, 40):
            x = torch.randn(batch, 70)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
        x = torch.randn(70, 3).t()
        torch.testing.assert_close(compiled(x), layer(x.contiguous()), rtol=1e-5, atol=1e-5)
    assert count.frame_count <= 3  # for one row, for any number of them, for other strides


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_flow_through_one_graph(layout: str) -> None:
    layer = packed(PackedLinear, layout)
    twin, x = copy.deepcopy(layer), torch.randn(5, 70, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    twin(other).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ROWS)
def test_rows_of_an_embedding(layout: str) -> None:
    layer = packed(PackedEmbedding, layout, bias=False)
    ids = torch.randint(24, (2, 5))
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(ids), layer(ids))


def test_a_conv1d_and_other_dtypes_unpack_in_one_graph() -> None:
    conv, linear, x = packed(PackedConv1D, "bitmask"), packed(PackedLinear, "bitmask"), torch.randn(2, 70)
    torch.testing.assert_close(torch.compile(conv, fullgraph=True, backend="aot_eager")(x), conv(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.compile(linear, fullgraph=True, backend="aot_eager")(x)
        assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), linear(x).float(), atol=0.2)
    with torch.no_grad():
        linear.bias.data = linear.bias.data.double()
        torch.testing.assert_close(torch.compile(linear, fullgraph=True, backend="aot_eager")(x.double()), linear(x.double()))


@pytest.mark.skipif(native() is None, reason="the native kernels were not built here")
def test_compiled_code_computes_natively_with_matrices_that_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real, matrices = native(), []

    class Seen:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(real, name)

    made = type(LAYOUTS["bitmask"]).matrix
    monkeypatch.setattr("rarefy.kernels.library.native", lambda: Seen())
    monkeypatch.setattr(type(LAYOUTS["bitmask"]), "matrix", lambda self, *given: matrices.append(given) or made(self, *given))
    model = nn.Sequential(packed(PackedLinear, "bitmask"), nn.ReLU(), packed(PackedLinear, "bitmask", shape=(5, 24)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 70)
    with torch.no_grad():
        y = compiled(x)
        calls.clear()
        torch.testing.assert_close(compiled(x), y)
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)
    assert calls.count("bitmask_linear") == 4 and len(matrices) == 2


@pytest.mark.parametrize("layout", ["flat", "int8-columns"])
def test_layers_of_as_many_bytes_share_a_graph(layout: str) -> None:
    """torch holds the shape of a parameter fixed: layers compiled one by one are compiled again for each number of bytes."""
    count = CompileCounter()

    @torch.compile(fullgraph=True, backend=count)
    def run(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    with torch.no_grad():
        for seed in range(12):
            layer, x = packed(PackedLinear, layout, seed=seed), torch.randn(1, 70)
            torch.testing.assert_close(run(layer, x), layer(x), rtol=1e-5, atol=1e-5)
    assert count.frame_count <= 2


def test_what_was_written_moved_or_dropped_is_seen() -> None:
    layer, x = packed(PackedLinear, "bitmask", bias=False), torch.ones(1, 70)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        before, other = compiled(x), LAYOUTS["bitmask"].pack(2 * layer.dense())
        layer.weight.copy_(other)
        torch.testing.assert_close(compiled(x), 2 * before)
    kept = len(ops._READY)
    del layer, compiled
    torch._dynamo.reset()
    gc.collect()
    assert len(ops._READY) < kept
