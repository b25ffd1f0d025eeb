"""Threads do not see each other: every kernel and the decoder give the same bits on 1, 2, 3 and 5 threads, over and over, in poisoned memory.

The sanitizers in use do not see data races, and libgomp hides its barriers from those that would. What a race spoils is a
result: shapes are random, so that shares end anywhere, batches need tiles of several widths, and NaN stands wherever nothing was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.kernels.dense import DenseMatrix
from rarefy.kernels.library import available, instruction_set
from rarefy.layouts import LAYOUTS
from rarefy.layouts.block import Block
from rarefy.runtime.decoder import LINEARS, Decoder, Sizes
from rarefy.runtime.decoder import Block as Layer
from rarefy.runtime.sieves import Sieve
from tests.test_kernels import NATIVE

pytestmark = NATIVE
THREADS, REPEATS = (2, 3, 5), 20
BLOCKS = {f"{height}x{width}": Block(sizes=((height, width),)) for height, width in ((4, 1), (1, 32), (16, 16), (20, 3))}
STORED = {**{name: layout for name, layout in LAYOUTS.items() if name not in ("block", "n_m_g")}, **BLOCKS}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty holds NaN, and the number of threads is as before."""
    before, filled = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.set_num_threads(before)


def random_shape(generator: torch.Generator) -> tuple[int, int]:
    """Large enough to be shared between threads, and no multiple of anything."""
    return tuple(int(torch.randint(low, high, (), generator=generator)) for low, high in ((280, 500), (260, 420)))  # type: ignore[return-value]


def stored(name: str, generator: torch.Generator) -> Any:
    shape = random_shape(generator)
    weight = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.5)
    return STORED[name].matrix(STORED[name].pack(weight), shape, torch.float32)


def on_all(compute: Callable[[], Tensor], repeats: int) -> tuple[Tensor, list[int]]:
    """What `compute` gives on one thread, and the numbers of threads that gave other bits at any of the repeats."""
    torch.set_num_threads(1)
    one, others = compute(), []
    for threads in THREADS:
        torch.set_num_threads(threads)
        if not all(torch.equal(compute(), one) for _ in range(repeats)):
            others.append(threads)
    return one, others


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("batch", [1, 3, 86])
def test_products(name: str, batch: int) -> None:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        matrix = stored(name, generator)
        x, bias = torch.randn(batch, matrix.columns, generator=generator), torch.randn(matrix.rows, generator=generator)
        if batch > 16 and matrix.kind != "blocks":
            x = x[:16].clone()  # the most rows that a kernel multiplies
        y, others = on_all(lambda matrix=matrix, x=x, bias=bias: matrix.linear(x, bias), REPEATS // 4)
        assert torch.isfinite(y).all() and others == []
        want = F.linear(x, matrix.dense(), bias)
        assert (y - want).norm() <= (0.02 if name.startswith("int") else 1e-5) * want.norm()


@pytest.mark.parametrize("name", [name for name in STORED if name not in ("flat", "columns")])
def test_unpacking(name: str) -> None:
    matrix = stored(name, torch.Generator().manual_seed(1))
    dense, others = on_all(matrix.dense, 5)
    assert torch.isfinite(dense).all() and others == []


def decoder(names: dict[str, str], gates: dict[str, Sieve], generator: torch.Generator) -> Decoder:
    """One or two layers of random sizes, each linear in its layout."""
    heads, head_dim, kv_heads = 4, 10, 2
    hidden, inner, vocab = (int(torch.randint(low, low + 60, (), generator=generator)) for low in (50, 130, 90))
    sizes = Sizes(hidden, inner, heads, kv_heads, head_dim, vocab, 2, 64, 1e-5)
    q, kv = heads * head_dim, kv_heads * head_dim
    shapes = {
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, q),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
        "head": (vocab, hidden),
    }

    def matrix(where: str) -> Any:
        weight = torch.randn(shapes[where], generator=generator) / 8
        weight *= torch.rand(weight.shape, generator=generator) < 0.6
        layout = STORED[names[where]]
        return layout.matrix(layout.pack(weight), shapes[where], torch.float32)

    gain, angle = torch.ones(hidden), torch.rand(64, head_dim // 2, generator=generator)
    layers = [Layer({where: (matrix(where), None) for where in LINEARS}, gain, gain, gates) for _ in range(2)]
    return Decoder(sizes, layers, DenseMatrix(torch.randn(vocab, hidden, generator=generator)), gain, matrix("head"), angle.cos(), angle.sin())


GATES = {
    "open": {},
    "thresholds": {name: Sieve(threshold=torch.tensor([0.05])) for name in ("q", "o", "up", "down", "units")},
    "largest": {"units": Sieve(keep=1, block=1), "gate": Sieve(threshold=torch.tensor([0.1]))},
}
PLAIN = [name for name in STORED if name not in ("compact", "flat")]


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("seed", range(4))
def test_decoder(gates: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = {where: PLAIN[int(torch.randint(len(PLAIN), (), generator=generator))] for where in (*LINEARS, "head")}
    made = decoder(names, GATES[gates], generator)
    prompt, then = torch.randint(made.sizes.vocab, (2, 7), generator=generator), torch.randint(made.sizes.vocab, (2, 1), generator=generator)

    def compute() -> Tensor:
        cache = made.cache(2)
        steps = [made.step(prompt, cache).flatten(), made.step(then, cache).flatten(), made.step(then, cache).flatten()]
        return torch.cat([*steps, cache.key.flatten(), cache.value.flatten()])

    found, others = on_all(compute, REPEATS // 4)
    assert torch.isfinite(found).all() and others == []


@pytest.mark.parametrize("isa", available())
def test_calls_at_the_same_time(isa: str) -> None:
    """Python threads meet in one matrix: kernels release the interpreter, and own all that they write."""
    generator = torch.Generator().manual_seed(0)
    torch.set_num_threads(2)
    with instruction_set(isa), ThreadPoolExecutor(3) as pool:
        for name in STORED:
            matrix = stored(name, generator)
            inputs = [torch.randn(batch, matrix.columns, generator=generator) for batch in (1, 2, 9)]
            alone = [matrix.linear(x) for x in inputs]
            for _ in range(3):
                assert all(torch.equal(y, one) for y, one in zip(pool.map(matrix.linear, inputs), alone, strict=True)), name
