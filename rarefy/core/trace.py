"""Trace: how the records of routed layers reach losses and telemetry without being stored on a layer."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Context, Entry, Routing


def replaying() -> bool:
    """True while backward recomputes a checkpointed forward: the record was taken already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _in_reentrant_checkpoint() -> bool:
    """Whether the caller runs inside the reentrant checkpoint's first forward, which cuts the graph of every record."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    code = CheckpointFunction.forward.__code__
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


class _Link:
    """One record and the link before it. A plain object, so that a compiled forward guards on its type and not on what it holds."""

    def __init__(self, before: _Link | None, record: Any) -> None:
        self.before, self.record = before, record


class _Chain:
    """Records in order of call. It grows by writing one attribute: a compiled forward does so without compiling anew per call."""

    def __init__(self) -> None:
        self.latest = _Link(None, None)

    def records(self) -> list[Any]:
        found, link = [], self.latest
        while link.before is not None:
            found.append(link.record)
            link = link.before
        return found[::-1]


class Collector:
    """What a Trace leaves at one tap."""

    def __init__(self, path: str, layer: nn.Module, chain: _Chain, rows: bool) -> None:
        self.path, self.layer, self.chain, self.rows = path, layer, chain, rows

    def add(self, routing: Routing, context: Context, x: Tensor) -> None:
        if replaying():
            return
        if _in_reentrant_checkpoint():
            raise Refused(f"reentrant checkpointing of {self.path or type(self.layer).__name__}", "a routed layer's losses would get no gradient", "pass use_reentrant=False")
        self.chain.latest = _Link(self.chain.latest, (self, routing, context, x if self.rows else None))


class Tap(nn.Module):
    """A no-op inside a layer: (routing, context, x) -> routing, after telling the open traces."""

    def __init__(self) -> None:
        super().__init__()
        self.collectors: list[Collector] = []

    def forward(self, routing: Routing, context: Context, x: Tensor) -> Routing:
        for collector in self.collectors:
            collector.add(routing, context, x)
        return routing


class Trace:
    """Collect an `Entry` per call of every layer with a `Tap`, in order of call, while the block runs.

    ``with Trace(model) as trace: model(x)`` leaves `trace.entries`; `rows=True` also keeps each layer's x [R, d].
    A layer's recomputation under non-reentrant checkpointing is not recorded twice, and losses on the entries of several
    forwards may share one backward. A compiled model may be traced at any time; opened anew, a Trace starts empty.

    Raises:
        BadInput: the model has no layer with a tap, or none of them ran inside the block.
        Refused: a layer runs under reentrant checkpointing (the loss would be right and its gradient silently absent), or
            in a compiled checkpoint that allows no record to leave it.
    """

    def __init__(self, model: nn.Module, *, rows: bool = False) -> None:
        self.model, self.rows = model, rows
        self._chain = _Chain()
        self._placed: list[tuple[Tap, Collector]] = []

    @property
    def entries(self) -> list[Entry]:
        """What was seen so far, in order of call."""
        calls: Counter[str] = Counter()
        found = []
        for collector, routing, context, x in self._chain.records():
            found.append(Entry(collector.path, calls[collector.path], collector.layer, routing, context, x))
            calls[collector.path] += 1
        return found

    @property
    def layers(self) -> dict[str, nn.Module]:
        """{path: layer} of what an open trace watches."""
        return {collector.path: collector.layer for _, collector in self._placed}

    def take(self) -> list[Entry]:
        """The entries so far, which the trace then forgets: what a trace that stays open lets go of after each step."""
        found = self.entries
        self._chain.latest = _Link(None, None)
        return found

    def __enter__(self) -> Trace:
        modules = dict(self.model.named_modules())
        taps = [(name.rpartition(".")[0], module) for name, module in modules.items() if isinstance(module, Tap)]
        if not taps:
            rule, remedy = "a trace needs a model with at least one routed layer", "make a Hugging Face model's routers visible with rarefy.hub.routers.adapt"
            raise BadInput(f"Trace of {type(self.model).__name__}", rule, remedy)
        self._chain = _Chain()
        self._placed = [(tap, Collector(path, modules[path], self._chain, self.rows)) for path, tap in taps]
        for tap, collector in self._placed:
            tap.collectors.append(collector)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        for tap, collector in self._placed:
            tap.collectors.remove(collector)
        self._placed = []
        refusal = None if error is None else _refusal(error)
        if refusal is not None:
            raise refusal from error
        if kind is None and not self._chain.records():
            raise BadInput("Trace without an entry", "a routed layer must run inside the block", "open the trace before the forward")


def _refusal(error: BaseException) -> Refused | None:
    """What the compiler's own error means for a traced, checkpointed model; None for any other error."""
    if not type(error).__module__.startswith("torch._dynamo") or "checkpoint" not in str(error):
        return None
    if "side effect" in str(error):
        remedy = "set torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True, or compile without fullgraph"
        return Refused("a Trace through a compiled checkpoint", "torch lets no record leave it as configured", remedy)
    if "context_fn" in str(error):
        return Refused("context_fn in a compiled checkpoint", "torch takes none there, and the compiled recomputation needs none", "leave context_fn out when compiling")
    return None
