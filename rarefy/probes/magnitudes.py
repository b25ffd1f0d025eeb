"""How large the weights are that are not zero, a histogram a kind of matrix, read from a folder's files one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rarefy.core.errors import BadFile
from rarefy.hub.plan import DTYPES, METHOD, NAMED, Layer, parse
from rarefy.layouts import LAYOUTS
from rarefy.probes.places import OUTSIDE, kind_of, split_name, tensor_of

MATRICES = 8  # of a kind that are read, evenly from first to last
WEIGHTS = 1 << 20  # of a matrix that are counted, in evenly spread runs of rows
RUNS = 16
FINE = 8  # bins an octave
LOWEST, HIGHEST = -40, 20  # octaves; smaller and larger ones are counted at the ends


@dataclass(frozen=True)
class Magnitudes:
    """One kind of matrix: how many matrices of how many were read, weights looked at, and those that are not zero by octave of their size.

    `counts[i]` weights have ``2 ** (LOWEST + i / FINE) <= |w| < 2 ** (LOWEST + (i + 1) / FINE)``.
    """

    kind: str
    read: int
    matrices: int
    weights: int
    counts: Sequence[int]

    @property
    def kept(self) -> int:
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """The size below which `share` of them lie, as if they were evenly spread inside a bin."""
        seen, wanted = 0, share * self.kept
        for i, count in enumerate(self.counts):
            if count and seen + count >= wanted:
                return float(2 ** (LOWEST + (i + (wanted - seen) / count) / FINE))
            seen += count
        return 0.0


def magnitudes(folder: Path, names: Sequence[str]) -> list[Magnitudes]:
    """A histogram a kind of the named matrices; what the files do not hold under that name is left out.

    Raises:
        BadFile: a plan or packed bytes that are damaged.
    """
    where = {key: path for path in sorted(folder.glob("*.safetensors")) if path.name != "masks.safetensors" for key in _keys(path)}
    layers = _layers(folder)
    kinds: dict[str, list[str]] = {}
    for name in names:
        if tensor_of(name)[0] in where:
            kinds.setdefault(kind_of(name), []).append(name)
    return [_kind(kind, found, where, layers) for kind, found in kinds.items()]


def matrices(folder: Path) -> list[str]:
    """The names of the matrices inside blocks, as the files of a plain folder have them, by block."""
    names = []
    for path in sorted(folder.glob("*.safetensors")):
        inside = [key for key in _keys(path) if key.endswith(".weight") and split_name(key)[0] != OUTSIDE]
        with safe_open(path, "pt") as file:
            names += [key for key in inside if len(file.get_slice(key).get_shape()) > 1]
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")])


def _kind(kind: str, names: Sequence[str], where: Mapping[str, Path], layers: Mapping[str, Layer]) -> Magnitudes:
    chosen = [names[round(i * (len(names) - 1) / max(MATRICES - 1, 1))] for i in range(MATRICES)] if len(names) > MATRICES else list(names)
    counts, weights = torch.zeros(FINE * (HIGHEST - LOWEST), dtype=torch.int64), 0
    for name in chosen:
        for part in _weights(name, where[tensor_of(name)[0]], layers.get(name.removesuffix(".weight"))):
            weights += part.numel()
            counts += _octaves(part)
    return Magnitudes(kind, len(chosen), len(names), weights, counts.tolist())


def _octaves(weight: Tensor) -> Tensor:
    """int64 [bins]: the weights that are not zero, by octave."""
    sizes = weight.float().abs().flatten()
    bins = ((sizes[sizes > 0].log2() - LOWEST) * FINE).floor().long().clamp(0, FINE * (HIGHEST - LOWEST) - 1)
    return torch.bincount(bins, minlength=FINE * (HIGHEST - LOWEST))


def _weights(name: str, path: Path, layer: Layer | None) -> Iterator[Tensor]:
    key, expert = tensor_of(name)
    with safe_open(path, "pt") as file:
        if layer is None:
            whole = file.get_slice(key)
            shape = tuple(whole.get_shape())[0 if expert is None else 1 :]
            yield from (whole[first:last] if expert is None else whole[expert, first:last] for first, last in _runs(shape))
            return
        packed = file.get_tensor(key)
    layer.verify(packed, name)
    dense = LAYOUTS[layer.layout].unpack(packed, layer.shape, DTYPES[layer.dtype])
    yield from (dense[first:last] for first, last in _runs(layer.shape))


def _runs(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Rows from and to: all of them, or `RUNS` runs of `WEIGHTS` weights together.

    >>> _runs((100, 10)), len(_runs((1 << 14, 1 << 10))), sum(last - first for first, last in _runs((1 << 14, 1 << 10))) << 10 == WEIGHTS
    ([(0, 100)], 16, True)
    """
    rows, across = shape[0], math.prod(shape[1:])
    if rows * across <= WEIGHTS or rows <= RUNS:
        return [(0, rows)]
    run = max(1, WEIGHTS // across // RUNS)
    return [(first, first + run) for first in (i * (rows - run) // (RUNS - 1) for i in range(RUNS))]


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise BadFile(str(path), f"it cannot be read ({error})", "write the folder again") from error


def _layers(folder: Path) -> Mapping[str, Layer]:
    config: Any = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    fields = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(fields, dict) or fields.get("quant_method") not in (METHOD, NAMED):
        return {}
    return parse({key: value for key, value in fields.items() if key != "quant_method"}).layers
