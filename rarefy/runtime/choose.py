"""Which layout a matrix is fastest in on this machine: measured, not guessed."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.journal import Journal
from rarefy.core.roles import Layout, Matrix
from rarefy.kernels.dense import DenseMatrix
from rarefy.kernels.library import native
from rarefy.layouts import LAYOUTS

DENSE = "dense"
ROUNDS, STRETCH = 5, 0.003  # interleaved rounds, each at least so many seconds long
KEPT = 3  # of the rounds, the fastest: another process makes some of them a hundred times as long
MEMORY = 256_000_000  # bytes over which the copies of a candidate are spread, so that no one is timed in cache alone
FEWER = 0.98  # of the dense bytes: what a layout may hold at most
RULE = 2  # of what is measured; raise it when that changes, so that kept measurements are made anew
STEP = 0.05  # densities that are measured apart


@dataclass(frozen=True)
class Choice:
    """The fastest layout (`dense` where no sparse one is faster), and microseconds of every candidate, summed over the batches."""

    layout: str
    us: dict[str, float]

    @property
    def because(self) -> str:
        others = ", ".join(f"{name} {us:.0f}" for name, us in sorted(self.us.items(), key=lambda each: each[1]) if name != self.layout)
        return f"{self.layout} is fastest here: {self.us[self.layout]:.0f} us against {others or 'nothing else'}"


@dataclass
class Chooser:
    """Choose a lossless layout for each matrix by timing it on this machine.

    Matrices of one shape and nearly one density share a measurement; measurements are kept in `journal`, under the
    processor, the instruction set, the number of threads and the versions.

    Args:
        batches: rows of x that the matrix will see; the times of all are added.
        journal: a JSON file of measurements, or None.
        margin: a sparse layout must be faster than the dense product by so much.
    """

    batches: Sequence[int] = (1,)
    journal: Path | None = None
    margin: float = 0.02
    _known: dict[str, Choice] = field(default_factory=dict)

    def __call__(self, weight: Tensor) -> Choice:
        """weight [O, I], float32."""
        density = round(int(torch.count_nonzero(weight)) / weight.numel() / STEP) * STEP
        key = f"{tuple(weight.shape)}|{density:.2f}|{_structure(weight)}|{tuple(self.batches)}|{weight.dtype}"
        if key not in self._known:
            kept = Journal(self.journal, _machine()) if self.journal else None
            us = kept.get(key) if kept else None
            if us is None:
                us = measure(weight, self.batches)
                if kept:
                    kept.put(key, us)
            self._known[key] = self._pick(us)
        return self._known[key]

    def _pick(self, us: dict[str, float]) -> Choice:
        best = min(us, key=us.__getitem__)
        return Choice(best if us[best] < (1 - self.margin) * us[DENSE] else DENSE, us)


def measure(weight: Tensor, batches: Sequence[int]) -> dict[str, float]:
    """Microseconds of ``x W^T`` by the dense product and by every lossless layout that holds the matrix in fewer bytes, summed over the batches.

    Medians of the fastest of interleaved rounds, over copies that no cache holds; a layout whose result is wrong is left out.

    Raises:
        BadInput: a batch below 1.
    """
    if not batches or min(batches) < 1:
        raise BadInput(f"batches {list(batches)}", "a batch is a number of rows, at least 1")
    matrices = {DENSE: _copies(lambda: DenseMatrix(weight.clone()), weight.numel() * weight.element_size())}
    for name, layout in LAYOUTS.items():
        if layout.lossless:
            try:
                packed = layout.pack(weight)
            except BadInput:
                continue
            if packed.numel() > FEWER * weight.numel() * weight.element_size():  # it leaves nothing out: only chance could make it the faster one
                continue
            matrices[name] = _copies(partial(_matrix, layout, packed, weight), packed.numel())
    total = dict.fromkeys(matrices, 0.0)
    for batch in batches:
        x = torch.randn(batch, weight.shape[1], generator=torch.Generator().manual_seed(batch)).to(weight.dtype)
        exact = x.double() @ weight.double().t()
        terms = x.double().abs() @ weight.double().abs().t()
        right = {name: bool((copies[0].linear(x).double() - exact).abs().le(1e-5 * terms + 1e-30).all()) for name, copies in matrices.items()}
        total = {name: total[name] for name in total if right[name]}
        for name, seconds in _interleaved({name: matrices[name] for name in total}, x).items():
            total[name] += 1e6 * seconds
    return total


def _matrix(layout: Layout, packed: Tensor, like: Tensor) -> Matrix:
    return layout.matrix(packed.clone(), (like.shape[0], like.shape[1]), like.dtype)


def _copies(make: Callable[[], Any], size: int) -> list[Any]:
    return [make() for _ in range(max(1, min(MEMORY // max(size, 1), 64)))]


def _interleaved(matrices: dict[str, list[Any]], x: Tensor) -> dict[str, float]:
    with torch.no_grad():
        calls = {name: max(1, round(STRETCH / max(_time(copies, x, 2), 1e-7))) for name, copies in matrices.items()}
        found: dict[str, list[float]] = {name: [] for name in matrices}
        for _ in range(ROUNDS):
            for name, copies in matrices.items():
                found[name].append(_time(copies, x, calls[name]))
    return {name: statistics.median(sorted(seconds)[:KEPT]) for name, seconds in found.items()}


def _time(copies: list[Any], x: Tensor, calls: int) -> float:
    began = time.perf_counter()
    for call in range(calls):
        copies[call % len(copies)].linear(x)
    return (time.perf_counter() - began) / calls


def _structure(weight: Tensor) -> str:
    """What of a matrix's structure a layout may use: how its densest row and its emptiest 4-row band compare with the mean."""
    rows = torch.count_nonzero(weight, dim=1).double()
    groups = (weight != 0).reshape(weight.shape[0], -1)[:, : weight.shape[1] // 4 * 4].reshape(-1, 4).any(1) if weight.shape[1] >= 4 else torch.ones(1)
    return f"{float(rows.max() / rows.mean().clamp_min(1)):.1f}|{float(groups.double().mean()):.1f}"


def _machine() -> str:
    extension = native()
    return f"{processor()}|{extension.isa() if extension else 'pytorch'}|{torch.get_num_threads()}|{torch.__version__}|{','.join(LAYOUTS)}|{RULE}"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()
