"""An expert store: weights stay in a safetensors file, and a bounded number of experts in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rarefy.core.errors import BadFile, BadInput

Pair = tuple[Tensor, Tensor]


class ExpertStore:
    """A gated bank for inference whose experts are read from a file when first needed; the least recently used one leaves.

    The file holds `<prefix>gate_up_proj` [E, 2I, H] and `<prefix>down_proj` [E, H, I]. At most `size` experts are kept;
    dispatch runs one expert at a time and the running one is never evicted, so any size from 1 to E gives the same bits.
    `hits` and `misses` count fetches. Use it as the bank of `dispatch`.

    Raises:
        BadFile: no such file, or it lacks a tensor or holds it in another layout.
        BadInput: a size outside 1..E.
    """

    def __init__(self, path: str | Path, size: int, *, prefix: str = "", act: Callable[[Tensor], Tensor] = F.silu) -> None:
        self.names = (f"{prefix}gate_up_proj", f"{prefix}down_proj")
        try:
            self._file = safe_open(str(path), framework="pt")
            first, second = (tuple(self._file.get_slice(name).get_shape()) for name in self.names)
        except (OSError, SafetensorError) as error:
            raise BadFile(f"expert file {path}", f"it must hold {' and '.join(self.names)}", str(error)) from error
        if not (len(first) == len(second) == 3 and first[0] == second[0] and first[1] == 2 * second[2] and first[2] == second[1]):
            raise BadFile(f"expert file {path}", f"shapes must be [E, 2I, H] and [E, H, I], and are {list(first)} and {list(second)}")
        self.experts, self.act = int(first[0]), act
        if not 1 <= size <= self.experts:
            raise BadInput(f"a cache of {size} experts", f"the size lies in 1..{self.experts}")
        self.size, self.hits, self.misses = size, 0, 0
        self._kept: OrderedDict[int, Pair] = OrderedDict()

    @property
    def kept(self) -> tuple[int, ...]:
        """The experts in memory, least recently used first."""
        return tuple(self._kept)

    def fetch(self, expert: int) -> Pair:
        """The expert's two matrices, from memory or from the file."""
        if expert in self._kept:
            self.hits += 1
            self._kept.move_to_end(expert)
            return self._kept[expert]
        self.misses += 1
        while len(self._kept) >= self.size:
            self._kept.popitem(last=False)
        first, second = (self._file.get_slice(name)[expert : expert + 1][0] for name in self.names)
        self._kept[expert] = (first, second)
        return first, second

    def _run(self, expert: int, x: Tensor) -> Tensor:
        first, second = self.fetch(expert)
        gate, up = F.linear(x, first).chunk(2, -1)
        return F.linear(self.act(gate) * up, second)

    def split(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """One function [n, H] -> [n, H] per expert; it fetches when called."""

        def bound(expert: int) -> Callable[[Tensor], Tensor]:
            return lambda x: self._run(expert, x)

        return [bound(e) for e in range(self.experts)]

    def each(self, x: Tensor, expert: Tensor) -> Tensor:
        """Row n [H] through expert[n], one row at a time."""
        rows = [self._run(e, x[n : n + 1]) for n, e in enumerate(expert.tolist())]
        return torch.cat(rows) if rows else self._run(0, x[:0])
