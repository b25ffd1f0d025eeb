"""Views on weights and gates on activations: the host's class is swapped, its state-dict keys stay.

A view takes the host's `op` for exact Linear, Conv and Embedding, a forward-scoped shadow otherwise; a gate sees the
first positional argument of the host's forward (its place is the module's path) or the tensor that it returns
(its place is `path:output`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.core.errors import BadInput, Refused
from rarefy.core.roles import Gate, View

Map = Callable[[Tensor, Tensor, Tensor | None], Tensor]
PREFIX = "rarefy_"
OUTPUT = ":output"
_SAVE = "save_pretrained"
_ENDS = {"": "rarefy_input", OUTPUT: "rarefy_output"}  # the end of a place: the child that holds its gate


def _linear(host: Any) -> Map:
    return F.linear


def _embedding(host: Any) -> Map:
    return lambda x, w, b: F.embedding(x, w, host.padding_idx, host.max_norm, host.norm_type, host.scale_grad_by_freq, host.sparse)


def _conv(host: Any) -> Map:
    return lambda x, w, b: host._conv_forward(x, w, b)


_MAPS: dict[type[nn.Module], Callable[[Any], Map]] = {nn.Linear: _linear, nn.Embedding: _embedding, nn.Conv1d: _conv, nn.Conv2d: _conv, nn.Conv3d: _conv}


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    gate, after = self._modules.get("rarefy_input"), self._modules.get("rarefy_output")
    if gate is not None:
        args = (gate(args[0]), *args[1:])
    return _ungated(self, *args, **kwargs) if after is None else after.around(_ungated, self, args, kwargs)


def _ungated(self: Any, *args: Any, **kwargs: Any) -> Any:
    base, held = type(self)._rarefy_base, self.__dict__["_rarefy_held"]
    if base in _MAPS and list(held) == ["weight"]:
        (view,) = held["weight"]
        weight, bias, apply = self._parameters["weight"], self._parameters.get("bias"), _MAPS[base](self)
        op = getattr(view, "op", None)
        return op(apply, args[0], weight, bias) if op is not None else apply(args[0], view(weight), bias)
    for param, (view,) in held.items():
        object.__setattr__(self, param, view(self._parameters[param]))
    try:
        return base.forward(self, *args, **kwargs)
    finally:
        for param in held:
            object.__delattr__(self, param)


def _host(module: Any) -> dict[str, tuple[View]]:
    """The views that a module holds, after its class is swapped for one that applies them and its gate."""
    cls = type(module)
    if not hasattr(cls, "_rarefy_base"):
        module.__dict__["_rarefy_held"] = {}
        module.__class__ = type(cls.__name__, (cls,), {"_rarefy_base": cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "forward": _forward})
    held: dict[str, tuple[View]] = module.__dict__["_rarefy_held"]
    return held


def _release(module: Any) -> None:
    if hasattr(type(module), "_rarefy_base") and not module.__dict__["_rarefy_held"] and not set(_ENDS.values()) & set(module._modules):
        del module.__dict__["_rarefy_held"]
        module.__class__ = type(module)._rarefy_base


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it is without views and gates."""
    found: type[nn.Module] = getattr(type(module), "_rarefy_base", type(module))
    return found


def attach_view(model: nn.Module, key: str, view: View) -> None:
    """Let every forward see `view(w)` where it used the parameter `key`.

    The view belongs to the tensor: every module that holds an alias (tied weights) becomes a host. The view is
    registered once, as child `rarefy_<param>` of the module that `key` names, so state-dict keys are only added.

    Raises:
        BadInput: no such parameter.
        Refused: it has a view already.
    """
    path, _, param = key.rpartition(".")
    owner = dict(model.named_modules()).get(path)
    tensor = None if owner is None else owner._parameters.get(param)
    if owner is None or tensor is None:
        raise BadInput(f"key {key!r}", "a view is attached to a parameter of the model", "take a name from model.named_parameters()")
    hosts = [(m, p) for m in model.modules() for p, q in m._parameters.items() if q is tensor]
    if any(p in m.__dict__.get("_rarefy_held", {}) for m, p in hosts):
        raise Refused(f"key {key!r}", "a tensor has one view", "detach the first one")
    for module, name in hosts:
        # A tuple in __dict__: not registered a second time on an alias's host, and deepcopy follows it.
        _host(module)[name] = (view,)
    owner.add_module(PREFIX + param, view)


def viewed(model: nn.Module) -> dict[str, tuple[nn.Parameter, View]]:
    """{key: (raw parameter, view)} of every view in the model."""
    found = {}
    for path, module in model.named_modules():
        for child, view in module._modules.items():
            if child.startswith(PREFIX) and isinstance(view, View):
                param = child.removeprefix(PREFIX)
                tensor = module._parameters[param]
                assert tensor is not None
                found[f"{path}.{param}" if path else param] = (tensor, view)
    return found


def detach(model: nn.Module) -> dict[str, View]:
    """Take every view off, leaving the raw weights: {key: view} to attach again. The classes are as before."""
    found = {key: view for key, (_, view) in viewed(model).items()}
    for module in list(model.modules()):
        if "_rarefy_held" in module.__dict__:
            for child in [c for c, v in module._modules.items() if c.startswith(PREFIX) and isinstance(v, View)]:
                del module._modules[child]
            module.__dict__["_rarefy_held"].clear()
            _release(module)
    return found


def split_place(place: str) -> tuple[str, str]:
    """The module's path and the child that holds its gate: of `mlp.act_fn:output`, `mlp.act_fn` and `rarefy_output`."""
    path, end = (place.removesuffix(OUTPUT), OUTPUT) if place.endswith(OUTPUT) else (place, "")
    return path, _ENDS[end]


def attach_gate(model: nn.Module, place: str, gate: Gate) -> None:
    """Let the module at `path` see `gate(x)` where its forward was given `x`, its first positional argument.

    With the place `path:output` it is the tensor that the module returns that is gated. The gate is the child
    `rarefy_input` or `rarefy_output` of the module, so state-dict keys are only added. It belongs to the module, not
    to the tensor: a module that shares its weight is not gated with it. A transformers model around it refuses
    `save_pretrained` from then on, which would leave the gate out, unless a plan in its config holds the gates.

    Raises:
        BadInput: no such module.
        Refused: there is a gate already.
    """
    path, child = split_place(place)
    module = dict(model.named_modules()).get(path)
    if module is None:
        raise BadInput(f"module {path!r}", "a gate is attached to a module of the model", "take a name from model.named_modules()")
    if child in module._modules:
        raise Refused(f"module {place!r}", "a place has one gate", "detach the first one")
    _host(module)
    module.add_module(child, gate)
    for holder in _around(model, path):
        holder.__dict__.setdefault(_SAVE, partial(_save, holder))


def _around(model: nn.Module, path: str) -> Iterator[Any]:
    """The modules from `model` down to `path` that transformers can save."""
    names = path.split(".") if path else []
    for depth in range(len(names) + 1):
        module = model.get_submodule(".".join(names[:depth]))
        if hasattr(type(module), _SAVE):
            yield module


def _save(model: Any, *args: Any, **kwargs: Any) -> Any:
    if not getattr(getattr(model, "hf_quantizer", None), "holds_gates", False):
        for place in gated(model):
            raise Refused(
                f"the gate on {place}",
                "save_pretrained would leave it out, and the folder would run dense",
                "save with rarefy.hub.packed.save_packed, or take gates off with rarefy.core.attach.detach_gates",
            )
    return getattr(type(model), _SAVE)(model, *args, **kwargs)


def gated(model: nn.Module) -> dict[str, Gate]:
    """{place: gate} of every gate in the model; a place is a module's path, for its input, or `path:output`."""
    return {path + end: gate for path, module in model.named_modules() for end, child in _ENDS.items() if isinstance(gate := module._modules.get(child), Gate)}


def detach_gates(model: nn.Module) -> dict[str, Gate]:
    """Take every gate off: {place: gate} to attach again. The classes are as before."""
    found = gated(model)
    for place in found:
        path, child = split_place(place)
        module = model.get_submodule(path)
        del module._modules[child]
        _release(module)
        for holder in _around(model, path):
            holder.__dict__.pop(_SAVE, None)
    return found


@contextmanager
def exported(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model is plain: its own classes and keys, exported values. Outside, training state is untouched, bit for bit.

    Raises:
        Refused: the model has gates, which a plain model cannot express.
    """
    for path in gated(model):
        raise Refused(f"the gate on {path}", "a plain model cannot express it, and would run dense", "save it with rarefy.hub.packed.save_packed, or detach the gates first")
    found = viewed(model)
    raw = {key: tensor.detach().clone() for key, (tensor, _) in found.items()}
    values = {key: view.export(tensor).weight.clone() for key, (tensor, view) in found.items()}
    views = detach(model)
    try:
        with torch.no_grad():
            for key, (tensor, _) in found.items():
                tensor.copy_(values[key])
        yield model
    finally:
        with torch.no_grad():
            for key, (tensor, _) in found.items():
                tensor.copy_(raw[key])
        for key, view in views.items():
            attach_view(model, key, view)
