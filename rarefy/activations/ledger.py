"""What gates spare: multiply-adds of a model's matrices, counted token by token from the zeros that are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.activations.rows import unpadded
from rarefy.activations.watch import Mlp, is_matrix, matrix_shape, mlps, without_grad
from rarefy.core.attach import OUTPUT, gated
from rarefy.core.collect import call, valid_tokens
from rarefy.core.errors import BadInput


@dataclass
class Count:
    """One matrix: tokens, its multiply-adds, those that no zero spares, and the entries of its inputs that are not zero."""

    shape: tuple[int, int]
    tokens: int = 0
    executed: int = 0
    inputs: int = 0

    @property
    def dense(self) -> int:
        return self.tokens * self.shape[0] * self.shape[1]


@dataclass
class Ledger:
    """{path of a matrix: its count}, {place of a gate: (entries kept and not zero, entries)}; integers, unpadded tokens only."""

    matrices: dict[str, Count] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)

    def density(self, place: str) -> float:
        """The fraction of a gated tensor's entries that is not zero after its gate."""
        kept, seen = self.places[place]
        return kept / seen

    def record(self) -> dict[str, Any]:
        """Multiply-adds a token, dense and executed, of all matrices together and of each."""
        tokens = max((count.tokens for count in self.matrices.values()), default=0)
        dense, executed = (sum(getattr(count, name) for count in self.matrices.values()) for name in ("dense", "executed"))
        rows = [
            {"name": path, "density": c.inputs / (c.tokens * c.shape[1]), "macs": c.dense / tokens, "macs_executed": c.executed / tokens}
            for path, c in self.matrices.items()
            if c.tokens
        ]
        return {"tokens": tokens, "macs": dense / tokens, "macs_executed": executed / tokens, "mac_density": executed / dense, "matrices": rows}


def measure(model: nn.Module, batches: Sequence[Any]) -> Ledger:
    """Count, in forwards of `batches`, what every Linear (or Conv1D) has to compute.

    ``executed = sum over tokens of nnz(input) * needed outputs;  dense = tokens * in * out``

    An input that is exactly zero spares its column, whoever made it zero. Of a matrix whose outputs are multiplied by
    gated units (`up` of a gated MLP), an output is needed where the unit is not zero. Attention scores, norms and fused
    experts are not counted, and nothing is said about time.

    Raises:
        BadInput: no batches, or no matrix was reached.

    >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> found = measure(model, [torch.ones(3, 2)]).record()
    >>> found["macs"], found["matrices"][0]["macs_executed"]
    (16.0, 8.0)
    """
    if not batches:
        raise BadInput("no batches", "a ledger counts what forwards do", "pass at least one batch")
    paired = {m.partner: m for m in mlps(model, batches[0]) if m.partner is not None and m.act + OUTPUT in gated(model)}
    ledger = Ledger()
    with without_grad(model), _counting(model, ledger, paired) as valid:
        for batch in batches:
            valid[0] = valid_tokens(batch)
            call(model, batch)
    if not any(count.tokens for count in ledger.matrices.values()):
        raise BadInput("the batches", "no Linear or Conv1D saw a token of them", "pass batches that reach the model's matrices")
    return ledger


@contextmanager
def _counting(model: nn.Module, ledger: Ledger, paired: dict[str, Mlp]) -> Iterator[list[Tensor | None]]:
    valid: list[Tensor | None] = [None]
    gates = gated(model)
    waiting: dict[str, Tensor] = {}  # unit counts of an MLP's gate until its partner has run, or the other way round

    def note(place: str, after: Tensor) -> None:
        kept, seen = ledger.places.get(place, (0, 0))
        ledger.places[place] = (kept + int(torch.count_nonzero(after)), seen + after.numel())

    def act(place: str, _: Any, __: Any, made: Tensor) -> None:
        rows = unpadded(made, valid[0])
        note(place, rows)
        for partner, mlp in paired.items():
            if mlp.act + OUTPUT == place:
                meet(partner, "units", (rows != 0).sum(-1))

    def matrix(path: str, _: Any, args: tuple[Tensor, ...], __: Any) -> None:
        x = gates[path](args[0]) if path in gates else args[0]
        rows = unpadded(x, valid[0])
        if path in gates:
            note(path, rows)
        count = ledger.matrices[path]
        nonzero = (rows != 0).sum(-1)
        count.tokens += rows.shape[0]
        count.inputs += int(nonzero.sum())
        if path in paired:
            meet(path, "inputs", nonzero)
        else:
            count.executed += int(nonzero.sum()) * count.shape[0]

    def meet(partner: str, side: str, counts: Tensor) -> None:
        other = waiting.pop(f"{partner} {'inputs' if side == 'units' else 'units'}", None)
        if other is None:
            waiting[f"{partner} {side}"] = counts
        else:
            ledger.matrices[partner].executed += int((other * counts).sum())

    hooks = []
    for path, module in model.named_modules():
        if is_matrix(module):
            ledger.matrices[path] = Count(matrix_shape(module))
            hooks.append(module.register_forward_hook(lambda *a, path=path: matrix(path, *a)))
        elif path + OUTPUT in gates:
            hooks.append(module.register_forward_hook(lambda *a, place=path + OUTPUT: act(place, *a)))
    try:
        yield valid
    finally:
        for handle in hooks:
            handle.remove()
