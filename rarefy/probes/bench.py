"""Sparse products against dense ones: interleaved rounds, weights out of cache, and no speed behind a wrong result. Measured only."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from rarefy.core.discover import pick
from rarefy.core.errors import BadInput
from rarefy.kernels.dense import DenseMatrix
from rarefy.kernels.library import native
from rarefy.layouts import LAYOUTS
from rarefy.probes import ggml
from rarefy.probes.roofline import roofline
from rarefy.probes.timers import busy, ratio
from rarefy.weights.patterns import parse_pattern

MEMORY = 1_500_000_000  # bytes that the copies of all weights of one row may take
SHORTEST = 0.004  # seconds that a timed stretch lasts at least

Product = Callable[[Tensor], Tensor]


def _torch(weight: Tensor) -> Product:
    return lambda x: F.linear(x, weight)


def _own_dense(weight: Tensor) -> Product:
    return DenseMatrix(weight).linear


def _torch_csr(weight: Tensor) -> Product:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its sparse tensors beta
        sparse = weight.to_sparse_csr()
    return lambda x: (sparse @ x.t()).t()


def _scipy_csr(weight: Tensor) -> Product:
    from scipy.sparse import csr_matrix

    sparse = csr_matrix(weight.numpy())
    return lambda x: torch.from_numpy((sparse @ x.numpy().T).T)


PEERS: dict[str, Callable[[Tensor], Product]] = {"torch-dense": _torch, "own-dense": _own_dense, "torch-csr": _torch_csr, "scipy-csr": _scipy_csr}


@dataclass(frozen=True)
class Subject:
    """A layout by name, and the pattern that its weights have.

    >>> Subject.parse("block@block:4x1")
    Subject(layout='block', pattern='block:4x1')
    """

    layout: str
    pattern: str = "matrix"

    @classmethod
    def parse(cls, text: str) -> Subject:
        layout, _, pattern = text.partition("@")
        pick(LAYOUTS, layout, "layout")
        parse_pattern(pattern or cls.pattern)
        return cls(layout, pattern or cls.pattern)

    def weight(self, shape: tuple[int, int], density: float, seed: int) -> Tensor:
        """Random [O, I] with the pattern's zeros, as near to the density as it reaches."""
        generator = Generator().manual_seed(seed)
        weight, pattern = torch.randn(shape, generator=generator), parse_pattern(self.pattern)
        count = pattern.nearest(shape, round(density * weight.numel()))
        return weight * pattern.mask(torch.rand(shape, generator=generator), count)


@dataclass(frozen=True)
class Contestant:
    """One way to compute the product, with as many copies of its weights as keep them out of cache."""

    copies: Sequence[Product]
    size: int  # bytes of the weights

    def time(self, x: Tensor, calls: int) -> float:
        """Seconds a call."""
        began = time.perf_counter()
        for call in range(calls):
            self.copies[call % len(self.copies)](x)
        return (time.perf_counter() - began) / calls


@dataclass(frozen=True)
class Work:
    """What a product cannot do without: bytes of stored weights, bytes of x and y, multiply-adds."""

    weights: int
    vectors: int
    macs: int


def cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """The largest cache of the first processor, 32 MiB where the system does not say.

    >>> cache_bytes(Path("nowhere"))
    33554432
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = [(file.read_text().strip() or "0") for file in root.glob("index*/size")]
    return max((int(text.rstrip("KMG")) * units.get(text[-1], 1) for text in found), default=2**25)


def bench(
    subjects: Sequence[Subject],
    shapes: Sequence[tuple[int, int]],
    densities: Sequence[float],
    batches: Sequence[int],
    peers: Sequence[str] = ("torch-dense",),
    *,
    rounds: int = 7,
    seed: int = 0,
    memory: int = MEMORY,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[dict[str, Any]]:
    """Time ``x W^T`` by every layout, and beside it by every peer.

    Args:
        memory: bytes that the copies of the weights may take together; with too few of them a small matrix stays in cache, and the row says so.

    Returns:
        [{op: "linear", layout, pattern, shape, density, batch, dtype, peer, ratio, ratio_min, ratio_max, ours_us, peer_us, max_abs_err, gb_per_s,
        roofline, threads, isa, torch, warning}]: `ratio` is the median over the rounds of peer over layout (above 1: the layout is
        faster), ratio_min and ratio_max the lowest and the highest of them; ours_us and peer_us medians; max_abs_err against the
        float64 product; gb_per_s the bytes of the stored weights over ours_us; roofline the least time that the stored weights, x and y
        and the multiply-adds by stored weights take on this machine over the time they took. Speeds are None where the product was wrong.

    Raises:
        BadInput: an unknown peer, fewer than 5 rounds, a density outside (0, 1].
    """
    checked(rounds, densities)
    known(peers)
    cases = [(subject, shape, density) for subject in subjects for shape in shapes for density in densities]
    rows: list[dict[str, Any]] = []
    for number, (subject, shape, density) in enumerate(cases):
        if progress:
            progress(number, len(cases), f"{subject.layout} {shape[0]}x{shape[1]} at {density:g}")
        rows += _case(subject, shape, density, batches, peers, rounds, seed, memory)
    return rows


def checked(rounds: int, densities: Sequence[float]) -> None:
    """Raise BadInput for fewer than 5 rounds or a density outside (0, 1]."""
    if rounds < 5:
        raise BadInput(f"{rounds} rounds", "a median with its spread takes at least 5", "pass rounds=5 or more")
    for density in densities:
        if not 0 < density <= 1:
            raise BadInput(f"density {density}", "a density is in (0, 1]")


def _case(subject: Subject, shape: tuple[int, int], density: float, batches: Sequence[int], peers: Sequence[str], rounds: int, seed: int, memory: int) -> Iterator[dict[str, Any]]:
    weight, share = subject.weight(shape, density, seed), memory // (1 + len(peers))
    made = {"": stored(subject.layout, weight, share), **{name: peer(name, weight, share) for name in peers}}
    cached = any(len(m.timed.copies) * m.timed.size < cache_bytes() for m in made.values())
    ours, kept = made[""], int((weight != 0).sum())
    what = {"layout": subject.layout, "pattern": subject.pattern, "shape": list(shape), "density": kept / weight.numel()}
    for batch in batches:
        x = torch.randn(batch, shape[1], generator=Generator().manual_seed(seed + 1))
        right = {name: m.right(x) for name, m in made.items()}
        seconds = interleaved({name: m.timed for name, m in made.items() if right[name]}, x, rounds) if right[""] else {}
        work, error = Work(ours.timed.size, 4 * batch * sum(shape), batch * kept), ours.max_abs_err(x)
        for name in peers:
            found = figures(seconds.get(""), seconds.get(name), work)
            end = {"max_abs_err": error, **conditions(cached, right[""] and right[name])}
            yield {"op": "linear", **what, "batch": batch, "dtype": "float32", "peer": name, **found, **end}


@dataclass(frozen=True)
class Made:
    """What is timed, the matrix that it stands for, and whether it sums in float32 (or rounds x to 8 bits)."""

    timed: Contestant
    means: Tensor
    exact: bool

    def right(self, x: Tensor) -> bool:
        return is_product(self.timed.copies[0](x), x, self.means, self.exact)

    def max_abs_err(self, x: Tensor) -> float:
        """Of the product against the float64 one."""
        error = self.timed.copies[0](x).double() - F.linear(x.double(), self.means.double())
        return float(error.abs().max()) if error.numel() else 0.0


def stored(name: str, weight: Tensor, memory: int) -> Made:
    """A layout by name."""
    layout, shape = LAYOUTS[name], (weight.shape[0], weight.shape[1])
    packed = layout.pack(weight)
    one = contestant(lambda: layout.matrix(packed.clone(), shape, weight.dtype).linear, packed.numel(), memory)
    return Made(one, layout.unpack(packed, shape, weight.dtype), layout.lossless)


def peer(name: str, weight: Tensor, memory: int) -> Made:
    """A peer by a name that `known` has seen: of PEERS, a layout, or one of llama.cpp's types."""
    if name in LAYOUTS:
        return stored(name, weight, memory)
    if name in ggml.NAMES:
        codes = ggml.quantised(weight, ggml.NAMES[name])
        return Made(contestant(lambda: ggml.GgmlMatrix(codes).linear, codes.size, memory), codes.dense(), False)
    return Made(contestant(lambda: PEERS[name](weight.clone()), weight.numel() * weight.element_size(), memory), weight, True)


def known(peers: Sequence[str]) -> None:
    """Raise BadInput for a peer that there is not."""
    for name in peers:
        if name not in PEERS and name not in LAYOUTS and name not in ggml.NAMES:
            raise BadInput(f"peer {name!r}", f"known are {', '.join([*PEERS, *ggml.NAMES])}, and the layouts {', '.join(LAYOUTS)}")


def contestant(make: Callable[[], Product], size: int, memory: int) -> Contestant:
    """One with as many copies as pass through the cache twice, within the memory."""
    wanted = min(memory, 2 * cache_bytes())
    return Contestant([make() for _ in range(max(1, min(wanted // max(size, 1), 256)))], size)


def is_product(y: Tensor, x: Tensor, weight: Tensor, exact: bool) -> bool:
    """Whether y is the float64 product, to float32 sums; to the rounding of x to 8 bits where the layout computes with it."""
    want = F.linear(x.double(), weight.double())
    if exact:
        terms = F.linear(x.double().abs(), weight.double().abs())
        return y.shape == want.shape and bool((y.double() - want).abs().le(1e-5 * terms + 1e-30).all())
    return y.shape == want.shape and bool((y.double() - want).norm() <= 0.02 * want.norm())


def interleaved(contestants: Mapping[str, Contestant], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds a call by name, round by round: every round times each contestant once, in turn."""
    calls = {name: max(1, math.ceil(SHORTEST / max(c.time(x, 2), 1e-9))) for name, c in contestants.items()}
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            found[name].append(contestant.time(x, calls[name]))
    return found


def figures(ours: list[float] | None, peer: list[float] | None, work: Work) -> dict[str, Any]:
    """What a row says of two contestants' seconds and the work that ours does."""
    if ours is None or peer is None:
        return dict.fromkeys(("ratio", "ratio_min", "ratio_max", "ours_us", "peer_us", "gb_per_s", "roofline"))
    took = statistics.median(ours)
    reached = {"gb_per_s": work.weights / took / 1e9, "roofline": roofline().share(work.weights + work.vectors, work.macs, took)}
    return {**ratio(peer, ours), "ours_us": took * 1e6, "peer_us": statistics.median(peer) * 1e6, **reached}


def conditions(cached: bool, right: bool) -> dict[str, Any]:
    """What a row says of the machine and of how far it can be trusted."""
    extension = native()
    words = [busy(), "weights may lie in cache: their copies are smaller than it" if cached else None, None if right else "the result is wrong: no speed is given"]
    return {"threads": torch.get_num_threads(), "isa": extension.isa() if extension else None, "torch": torch.__version__, "warning": "; ".join(w for w in words if w) or None}
