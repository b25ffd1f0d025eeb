"""Products with dense weights and inputs of which some are exactly zero, as a gate leaves them, against products that read every weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from rarefy.core.errors import BadInput
from rarefy.probes.bench import MEMORY, Subject, Work, cache_bytes, checked, conditions, figures, interleaved, known, peer, stored


def bench_skip(
    subjects: Sequence[Subject],
    shapes: Sequence[tuple[int, int]],
    densities: Sequence[float],
    batches: Sequence[int],
    peers: Sequence[str] = ("torch-dense", "own-dense"),
    *,
    rounds: int = 7,
    seed: int = 0,
    memory: int = MEMORY,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[dict[str, Any]]:
    """Time ``x W^T`` by every layout where x has zeros and W has none, and beside it by every peer.

    Args:
        densities: shares of the entries of x that are not zero, each row of x drawn by itself.
        peers: see `rarefy.probes.bench.peer`: `int4`, say, reads every weight in as many bits as `int4-columns`.
        memory: as in `rarefy.probes.bench.bench`.

    Returns:
        As `bench`; `density` is that of x, and gb_per_s and roofline count the stored bytes times the share of columns that some row of x needs.

    Raises:
        BadInput: as `bench`, or a subject with a pattern: the weights are dense here.
    """
    checked(rounds, densities)
    for subject in subjects:
        if subject.pattern != Subject.pattern:
            raise BadInput(f"layout {subject.layout}@{subject.pattern}", "the weights are dense where zeros of the input are timed", "name the layout alone")
    known(peers)
    cases = [(subject.layout, shape) for subject in subjects for shape in shapes]
    rows: list[dict[str, Any]] = []
    for number, (layout, shape) in enumerate(cases):
        if progress:
            progress(number, len(cases), f"{layout} {shape[0]}x{shape[1]}")
        rows += _case(layout, shape, densities, batches, peers, rounds, seed, memory // (1 + len(peers)))
    return rows


def _case(
    layout: str, shape: tuple[int, int], densities: Sequence[float], batches: Sequence[int], peers: Sequence[str], rounds: int, seed: int, share: int
) -> Iterator[dict[str, Any]]:
    weight = torch.randn(shape, generator=Generator().manual_seed(seed))
    made = {"": stored(layout, weight, share), **{name: peer(name, weight, share) for name in peers}}
    cached = any(len(m.timed.copies) * m.timed.size < cache_bytes() for m in made.values())
    for density in densities:
        for batch in batches:
            x = inputs(batch, shape[1], density, seed + 1)
            right = {name: m.right(x) for name, m in made.items()}
            seconds = interleaved({name: m.timed for name, m in made.items() if right[name]}, x, rounds) if right[""] else {}
            needed = float((x != 0).any(0).double().mean())
            error = made[""].max_abs_err(x)
            work = Work(round(made[""].timed.size * needed), 4 * batch * sum(shape), int((x != 0).sum()) * shape[0])
            head = {"op": "skip", "layout": layout, "pattern": Subject.pattern, "shape": list(shape), "density": int((x != 0).sum()) / x.numel(), "batch": batch}
            for name in peers:
                end = {"max_abs_err": error, **conditions(cached, right[""] and right[name])}
                yield {**head, "dtype": "float32", "peer": name, **figures(seconds.get(""), seconds.get(name), work), **end}


def inputs(batch: int, columns: int, density: float, seed: int) -> Tensor:
    """x [B, I], each row of which has as many entries that are not zero as are nearest to the density, at least one.

    >>> (inputs(2, 8, 0.25, 0) != 0).sum(1).tolist()
    [2, 2]
    """
    generator = Generator().manual_seed(seed)
    x = torch.randn(batch, columns, generator=generator)
    order = torch.rand(batch, columns, generator=generator).argsort(1)
    return torch.where(order < max(1, round(density * columns)), x, 0.0)
