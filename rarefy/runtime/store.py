"""An expert store: weights stay in a safetensors file, and a bounded number of experts in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rarefy.core.errors import BadFile, BadInput
from rarefy.core.records import Key
from rarefy.core.roles import Policy
from rarefy.runtime.cache import Cache
from rarefy.runtime.policies.lru import LRU

Pair = tuple[Tensor, Tensor]


class ExpertStore:
    """A gated bank for inference whose experts are read from a file when first needed; a policy says which one leaves.

    The file holds `<prefix>gate_up_proj` [E, 2I, H] and `<prefix>down_proj` [E, H, I]. At most `size` experts are kept;
    dispatch runs one expert at a time and the running one is never evicted, so any size from 1 to E and any policy give the
    same bits. `hits` and `misses` count fetches. Use it as the bank of `dispatch`.

    Raises:
        BadFile: no such file, or it lacks a tensor or holds it in another layout.
        BadInput: a size outside 1..E.
    """

    def __init__(self, path: str | Path, size: int, *, prefix: str = "", act: Callable[[Tensor], Tensor] = F.silu, policy: Policy | None = None) -> None:
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
        self.cache: Cache[Pair] = Cache(size, policy or LRU(), self._read)

    @property
    def kept(self) -> tuple[Key, ...]:
        """The experts in memory, in the order of their loading."""
        return self.cache.resident

    @property
    def hits(self) -> int:
        return self.cache.hits

    @property
    def misses(self) -> int:
        return self.cache.misses

    def _read(self, expert: int) -> Pair:
        first, second = (self._file.get_slice(name)[expert : expert + 1][0] for name in self.names)
        return first, second

    def fetch(self, expert: int, later: Sequence[int] = ()) -> Pair:
        """The expert's two matrices, from memory or from the file; `later` are the experts that this call uses next, as far as known."""
        return self.cache.fetch(expert, later)

    def state_dict(self) -> dict[str, Any]:
        """What the next evictions depend on: the policy's state and which experts are kept."""
        return self.cache.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the kept experts are read again."""
        self.cache.load_state_dict(state)

    def _run(self, expert: int, x: Tensor, later: Sequence[int] = ()) -> Tensor:
        first, second = self.fetch(expert, later)
        gate, up = F.linear(x, first).chunk(2, -1)
        return F.linear(self.act(gate) * up, second)

    def split(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """One function [n, H] -> [n, H] per expert; it fetches when called."""

        def bound(expert: int) -> Callable[[Tensor], Tensor]:
            return lambda x: self._run(expert, x)

        return [bound(e) for e in range(self.experts)]

    def each(self, x: Tensor, expert: Tensor) -> Tensor:
        """Row n [H] through expert[n], one row at a time."""
        needed = expert.tolist()
        rows = [self._run(e, x[n : n + 1], needed[n + 1 :]) for n, e in enumerate(needed)]
        return torch.cat(rows) if rows else self._run(0, x[:0])
