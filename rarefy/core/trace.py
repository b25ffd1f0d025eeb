"""Trace: how the records of routed layers reach losses and telemetry without being stored on a layer."""

from __future__ import annotations

import sys
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Context, Entry, Routing


class Tap(nn.Module):
    """A no-op inside a layer: (routing, context, x) -> routing. Its forward hooks are the collectors."""

    def forward(self, routing: Routing, context: Context, x: Tensor) -> Routing:
        return routing


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


class Trace:
    """Collect an `Entry` per call of every layer with a `Tap`, in order of call, while the block runs.

    ``with Trace(model) as trace: model(x)`` leaves `trace.entries`; `rows=True` also keeps each layer's x [R, d].
    The recomputation of a checkpointed layer is not recorded twice.

    Raises:
        BadInput: the model has no layer with a tap, or none of them ran inside the block.
        Refused: a layer runs under reentrant checkpointing (the loss would be right and its gradient silently absent).
    """

    def __init__(self, model: nn.Module, *, rows: bool = False) -> None:
        self.model, self.rows = model, rows
        self.entries: list[Entry] = []
        self._handles: list[RemovableHandle] = []
        self._calls: dict[str, int] = {}

    def __enter__(self) -> Trace:
        parents = dict(self.model.named_modules())
        taps = [(name.rpartition(".")[0], module) for name, module in parents.items() if isinstance(module, Tap)]
        if not taps:
            raise BadInput(f"Trace of {type(self.model).__name__}", "a trace needs a model with at least one routed layer")
        self._handles = [tap.register_forward_hook(self._hook(path, parents[path])) for path, tap in taps]
        return self

    def _hook(self, path: str, layer: nn.Module) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], out: Routing) -> None:
            if replaying():
                return
            if _in_reentrant_checkpoint():
                raise Refused(f"reentrant checkpointing of {path or type(layer).__name__}", "a routed layer's losses would get no gradient", "pass use_reentrant=False")
            call = self._calls.get(path, 0)
            self._calls[path] = call + 1
            self.entries.append(Entry(path, call, layer, out, args[1], args[2] if self.rows else None))

        return record

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if kind is None and not self.entries:
            raise BadInput("Trace without an entry", "a routed layer must run inside the block", "open the trace before the forward (and before the first compiled call)")
