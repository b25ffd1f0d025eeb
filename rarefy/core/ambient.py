"""Ambient: how what a host model was called with reaches routed layers that are called with hidden states only."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Context, Routing
from rarefy.core.trace import replaying

_ROWS = ("ids", "valid", "owner", "positions", "labels")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Given:
    """What a block sets: fields of a Context; `live` and `routing` for all layers, or a mapping by the path of a layer."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    live: Tensor | Mapping[str, Tensor] | None = None
    routing: Routing | Mapping[str, Routing] | None = None


class _View:
    """What one thread sees: the block it is in, and the root call it is in."""

    def __init__(self) -> None:
        self.given: Given | None = None
        self.call: tuple[Context, Given] | None = None


class Seat(nn.Module):
    """A no-op inside a routed layer: () -> Context. Without an `Ambient` on the model the context is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.ambient: Ambient | None = None
        self.path = ""

    def forward(self) -> Context:
        return Context() if self.ambient is None else self.ambient.context(self.path)


class Ambient:
    """The context of one model, set by its root call and read by its routed layers.

    ``ambient = Ambient.attach(model)`` reads every call of `model`: `input_ids` (or the first argument) [B, T],
    `attention_mask` [B, past + T], `position_ids`; rows are the B*T new tokens, row-major. ``with ambient.given(...)``
    adds what no call carries (labels, live experts, a shared routing), or replaces what was read. Each thread has its own.
    Under non-reentrant checkpointing pass `context_fn=ambient.replay`, so that the recomputation sees its own call's context.

    Raises:
        BadInput: the model has no routed layer; a mask that is not [B, past + T] (set `valid` in a block instead).
        Refused: the model has an Ambient already, or is an encoder with a decoder (attach one to each); it generates text, and a
            layer's tokens see later ones; a checkpointed layer is recomputed without `replay`.

    >>> class Host(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.seat = Seat()
    ...     def forward(self, input_ids, attention_mask=None):
    ...         return self.seat()
    >>> host = Host()
    >>> ambient = Ambient.attach(host)
    >>> with ambient.given(labels=torch.tensor([7, 8])):
    ...     seen = host(torch.tensor([[5, 6], [0, 9]]), attention_mask=torch.tensor([[1, 1], [0, 1]]))
    >>> seen.ids.tolist(), seen.valid.tolist(), seen.owner.tolist(), seen.positions.tolist(), seen.labels.tolist()
    ([5, 6, 0, 9], [True, True, False, True], [0, 0, 1, 1], [0, 1, 0, 0], [7, 7, 8, 8])
    """

    def __init__(self) -> None:
        self._views = _views()
        self._seats: list[Seat] = []
        self._handles: list[RemovableHandle] = []

    @classmethod
    def attach(cls, model: nn.Module) -> Ambient:
        """An Ambient that reads the calls of `model` and serves its routed layers, until `detach`."""
        seats = {path: module for path, module in model.named_modules() if isinstance(module, Seat)}
        if not seats:
            raise BadInput(f"Ambient of {type(model).__name__}", "it needs a model with at least one routed layer")
        if any(seat.ambient is not None for seat in seats.values()):
            raise Refused(f"a second Ambient on {type(model).__name__}", "a layer reads one context", "detach the first one")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True:
            raise Refused(f"one Ambient on {type(model).__name__}", "its encoder and decoder see different tokens", "attach one to each of the two")
        ahead = [path for path in (seat.rpartition(".")[0] for seat in seats) if getattr(model.get_submodule(path), "causal", True) is False]
        if ahead and _generates(model):
            raise Refused(f"{ahead[0]} in {type(model).__name__}", "its tokens see later ones, and the model generates text", "use a layer that routes each token by itself")
        ambient = cls()
        for path, seat in seats.items():
            seat.ambient, seat.path = ambient, path.rpartition(".")[0]
        ambient._seats = list(seats.values())
        ambient._handles = [model.register_forward_pre_hook(ambient._enter, with_kwargs=True), model.register_forward_hook(ambient._leave, always_call=True)]
        return ambient

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        for seat in self._seats:
            seat.ambient = None
        self._handles, self._seats = [], []

    @contextmanager
    def given(self, *, live: Tensor | Mapping[str, Tensor] | None = None, routing: Routing | Mapping[str, Routing] | None = None, **fields: Any) -> Iterator[Ambient]:
        """Set fields of the context for calls inside the block: `labels` [B] or [B*T], `live` [E] or {layer path: [E]}, `routing`, `ids`, `valid`, ..."""
        unknown = set(fields) - {*_ROWS, "cache"}
        if unknown:
            raise BadInput(f"context field {sorted(unknown)[0]!r}", f"a block sets {', '.join((*_ROWS, 'cache', 'live', 'routing'))}")
        view = self._view()
        outer = view.given
        base = outer or Given()
        view.given = Given({**base.fields, **fields}, base.live if live is None else live, base.routing if routing is None else routing)
        try:
            yield self
        finally:
            view.given = outer

    def replay(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """The `context_fn` of non-reentrant checkpointing: the recomputation sees the context of this very call.

        A compiled model needs none and torch refuses one there: what is recomputed is the graph, with its inputs.
        """
        return nullcontext(), self._again(self._view().call, self._view().given)

    @contextmanager
    def _again(self, call: tuple[Context, Given] | None, given: Given | None) -> Iterator[None]:
        view = self._view()
        before = (view.call, view.given)
        view.call, view.given = call or (_context(given), given or Given()), given
        try:
            yield
        finally:
            view.call, view.given = before

    def context(self, path: str) -> Context:
        """The context of the layer at `path` in the present call."""
        view = self._view()
        call = view.call
        if call is None:
            if replaying():
                raise Refused(f"the recomputation of {path or 'the model'} under checkpointing", "it would not see the context of its call", _REMEDY)
            call = (_context(view.given), view.given or Given())
        context, given = call
        return replace(context, live=_of_layer(given.live, path), routing=_of_layer(given.routing, path))

    def _view(self) -> _View:
        if not hasattr(self._views, "mine"):
            self._views.mine = _View()
        mine: _View = self._views.mine
        return mine

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        view = self._view()
        given = view.given or Given()
        view.call = (_read(args, kwargs, given.fields), given)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self._view().call = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _views=_views())


def _views() -> threading.local:
    """A plain threading.local: a compiled forward loses what is written to a subclass of it."""
    views = threading.local()
    views.mine = _View()
    return views


_REMEDY = "checkpoint with use_reentrant=False and context_fn=ambient.replay"


def aligned(context: Context, rows: int) -> Context:
    """The context, once every row-aligned field has `rows` rows. Raises BadInput where one has not."""
    for name in _ROWS:
        value = getattr(context, name)
        if value is not None and value.numel() != rows:
            raise BadInput(f"context field {name} of {value.numel()} rows", f"the layer sees {rows}", f"give {name} for the rows of the layer")
    return context


def _generates(model: nn.Module) -> bool:
    """Whether a transformers model predicts each token from those before it."""
    can, config = getattr(model, "can_generate", None), getattr(model, "config", None)
    return getattr(config, "is_decoder", False) is True or (callable(can) and can() is True)


def _of_layer(value: _T | Mapping[str, _T] | None, path: str) -> _T | None:
    return value.get(path) if isinstance(value, Mapping) else value


def _context(given: Given | None) -> Context:
    return Context() if given is None else Context(**given.fields)


def _read(args: tuple[Any, ...], kwargs: Mapping[str, Any], fields: Mapping[str, Any]) -> Context:
    tokens = _tokens(args, kwargs)
    if tokens is None:
        return Context(**fields)
    ids, (batch, time), device = tokens
    mask = None if "valid" in fields else _mask(kwargs.get("attention_mask"), batch, time)
    read = {
        "ids": None if ids is None else ids.reshape(-1),
        "valid": None if mask is None else mask[:, mask.shape[1] - time :].bool().reshape(-1),
        "owner": torch.arange(batch, device=device).repeat_interleave(time),
        "positions": _positions(kwargs, mask, batch, time, device),
    }
    labels = {"labels": _labels(fields["labels"], batch, time)} if "labels" in fields else {}
    return Context(**{**read, **fields, **labels})


def _tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, tuple[int, int], torch.device] | None:
    """Token ids [B, T] or None, (B, T), and the device; None where the call has neither ids nor embeddings."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
        return ids, (ids.shape[0], ids.shape[1]), ids.device
    embedded = kwargs.get("inputs_embeds")
    return None if embedded is None else (None, (embedded.shape[0], embedded.shape[1]), embedded.device)


def _mask(mask: Any, batch: int, time: int) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < time:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise BadInput(f"attention_mask {shape} of a call with {batch} x {time} tokens", "an Ambient reads a mask [B, past + T]", "set valid in ambient.given(valid=...)")
    return mask


def _positions(kwargs: Mapping[str, Any], mask: Tensor | None, batch: int, time: int, device: torch.device) -> Tensor:
    given = kwargs.get("position_ids")
    if isinstance(given, Tensor) and given.dim() == 2:
        return given.expand(batch, time).reshape(-1)
    if mask is not None:
        return (mask.long().cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] - time :].reshape(-1)
    cache = kwargs.get("past_key_values")
    past = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(time, device=device) + past).repeat(batch)


def _labels(labels: Tensor, batch: int, time: int) -> Tensor:
    if labels.numel() == batch * time:
        return labels.reshape(-1)
    if labels.numel() == batch:
        return labels.reshape(-1).repeat_interleave(time)
    raise BadInput(f"{labels.numel()} task labels", f"the call has {batch} sequences of {time} tokens", "give one label per sequence or per token")
