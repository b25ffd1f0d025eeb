"""Greedy blocks: in every block, activations are given up where that moves the block's output least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from rarefy.activations.gates.threshold import Threshold
from rarefy.activations.rows import collect_rows
from rarefy.activations.watch import without_grad
from rarefy.core.attach import attach_gate, detach_gates, gated
from rarefy.core.errors import BadInput, Refused
from rarefy.core.roles import Sharing
from rarefy.weights.blocks import Calls, capture, find_chain, run_block


@dataclass(frozen=True)
class GreedyBlocks(Sharing):
    """Each block reaches the asked density by moves of equal cost, each where the block's output error grows least.

    ``sum_p n_p d_p = density * sum_p n_p in every block;  a move lowers one d_p by step * sum(n) / n_p;  error = ||Y - Y'||_F over the last `tail` of every sequence``

    n_p are the multiply-adds of a token behind place p. Blocks see the dense model's activations; the gates tried are
    thresholds on rows of the same batches, of which the first `windows` are used. The last move is as small as is needed.

    Raises:
        BadInput: a density that no place can reach; a model without a chain of blocks.
        Refused: the model has gates.
    """

    name: ClassVar[str] = "greedy-blocks"

    step: float = 0.02
    tail: float = 0.25
    windows: int = 4
    floor: float = 0.02

    def densities(self, model: nn.Module, sizes: Mapping[str, int], density: float, batches: Sequence[Any]) -> dict[str, float]:
        if gated(model):
            raise Refused("a model with gates", "densities are searched from the dense model", "detach the gates first")
        if not self.floor < density <= 1:
            raise BadInput(f"density {density}", f"a greedy search leaves every place above {self.floor}", "pass a density between that and 1")
        used = list(batches[: self.windows])
        if not used or not (chain := find_chain(model, used[0])):
            raise BadInput("a model without a chain of blocks", "each block's output error is what is searched by", "share evenly, or pass calibration batches")
        calls = capture(model, chain, used)
        found: dict[str, float] = {}
        with without_grad(model):
            for index, (path, block) in enumerate(chain):
                mine = {place: size for place, size in sizes.items() if place.startswith(f"{path}.")}
                if mine:
                    found |= self._block(model, mine, density, calls, index, block, collect_rows(model, list(mine), used))
                for one in calls:
                    one.hidden = run_block(block, one, index)
        return {place: found.get(place, density) for place in sizes}

    def _block(
        self, model: nn.Module, sizes: Mapping[str, int], density: float, calls: Sequence[Calls], index: int, block: nn.Module, rows: Mapping[str, Tensor]
    ) -> dict[str, float]:
        tables = {place: rows[place].abs().flatten().sort().values for place in sizes}
        gates = {place: Threshold() for place in sizes}
        wanted = [self._end(run_block(block, one, index)) for one in calls]

        def set_to(place: str, share: float) -> None:
            table = tables[place]
            gates[place].threshold.fill_(0.0 if share >= 1 else float(table[table.numel() - max(1, round(share * table.numel()))]))

        def error() -> float:
            return sum(float((self._end(run_block(block, one, index)) - y).double().square().sum()) for one, y in zip(calls, wanted, strict=True))

        for place, gate in gates.items():
            attach_gate(model, place, gate.to(tables[place].device))
        try:
            return self._walk(sizes, density, set_to, error)
        finally:
            detach_gates(model)

    def _walk(self, sizes: Mapping[str, int], density: float, set_to: Any, error: Any) -> dict[str, float]:
        total, now = sum(sizes.values()), dict.fromkeys(sizes, 1.0)
        excess = (1 - density) * total
        while excess > 1e-9 * total:
            move = min(excess, self.step * total)
            errors: dict[str, float] = {}
            for place, size in sizes.items():
                if now[place] > self.floor:
                    set_to(place, max(self.floor, now[place] - move / size))
                    errors[place] = error()
                    set_to(place, now[place])
            best = min(errors, key=lambda place: errors[place])
            after = max(self.floor, now[best] - move / sizes[best])
            excess -= (now[best] - after) * sizes[best]
            now[best] = after
            set_to(best, after)
        return now

    def _end(self, y: Tensor) -> Tensor:
        """The last `tail` of the tokens, at least one."""
        return y if y.dim() < 3 else y[:, min(y.shape[1] - 1, int(y.shape[1] * (1 - self.tail))) :]
