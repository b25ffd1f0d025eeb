"""Formats of the tensors of a model that exists: weights, what modules return, and the gradients of both, by qualified name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.core.attach import OUTPUT, attach_gate, attach_view, plain_type, viewed
from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Paper, Progress
from rarefy.core.roles import Gate, Selection
from rarefy.layouts.formats import Format
from rarefy.layouts.registry import DENSE, STEN
from rarefy.layouts.selections import All, Same
from rarefy.weights.sparsifier import axes_of
from rarefy.weights.views.laid import Laid


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is kept.

    Args:
        initial: what of it stays at first.
        layout: what its operator is given it in.
        after_step: what stays after each step of the optimizer; `Same()` keeps the pattern.
        gradient: the format of its gradient; None leaves it dense.
    """

    paper: ClassVar[Paper] = STEN

    initial: Selection = field(default_factory=All)
    layout: str = DENSE
    after_step: Selection = field(default_factory=Same)
    gradient: Format | None = None


@dataclass(frozen=True)
class OutputFormat:
    """How what a module returns is kept, and its gradient; None lets through what the forward kept."""

    stored: Format = field(default_factory=Format)
    gradient: Format | None = None


def set_formats(model: nn.Module, formats: Mapping[str, WeightFormat | OutputFormat], optimizer: Optimizer | None = None) -> nn.Module:
    """Set formats on a model, in place; parameters, their names and the optimizer that holds them stay the same objects.

    Args:
        formats: {parameter name: WeightFormat, `path:output` for what the module at `path` returns: OutputFormat}.
        optimizer: after each of its steps the weights' patterns are kept or chosen anew. Without one, call
            `follow(model, optimizer)` once there is one; a `rarefy.Sparsifier` on the model does it too.

    Returns:
        The model.

    Raises:
        BadInput: a name that is no parameter or module, a format of the wrong kind, or a shape that a pattern does not fit. Then nothing was set.
        Refused: the tensor has a view, or the module a gate on its output, already.

    >>> from rarefy.layouts.selections import Largest
    >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    >>> _ = set_formats(model, {"0.weight": WeightFormat(Largest(0.5), "csr"), "1:output": OutputFormat(Format(layout="bitmask"))})
    >>> int((model[0].weight != 0).sum()), model(torch.ones(1, 4))
    (4, LayoutTensor(bitmask, shape=(1, 2), dtype=torch.float32))
    """
    parameters, modules, views = dict(model.named_parameters()), dict(model.named_modules()), viewed(model)
    ready: list[Callable[[], None]] = []
    for name, form in formats.items():
        path = name.removesuffix(OUTPUT)
        if isinstance(form, OutputFormat):
            if path == name or path not in modules:
                raise BadInput(f"{name!r}", "an OutputFormat is for PATH:output, where PATH is a module of the model", "take PATH from model.named_modules()")
            ready.append(_output(model, name, form))
            continue
        if name not in parameters:
            raise BadInput(f"{name!r}", "a WeightFormat is for a parameter of the model", "take a name from model.named_parameters()")
        if name in views:
            raise Refused(f"{name!r}", "a tensor has one view", "detach the first one")
        ready.append(_weight(model, name, parameters[name], form))
    for put in ready:
        put()
    if optimizer is not None:
        follow(model, optimizer)
    return model


def _weight(model: nn.Module, name: str, weight: Tensor, form: WeightFormat) -> Callable[[], None]:
    Format(layout=form.layout)
    view = Laid(torch.ones_like(weight, dtype=torch.bool), form.layout, form.after_step, form.gradient, axes_of(model).get(name))
    view.choose(weight.detach(), form.initial)

    @torch.no_grad()
    def put() -> None:
        attach_view(model, name, view)
        weight.masked_fill_(~view.mask, 0.0)

    return put


def _output(model: nn.Module, name: str, form: OutputFormat) -> Callable[[], None]:
    return lambda: attach_gate(model, name, LaidOutput(form))


class LaidOutput(Gate):
    """What a module returns, in a format. Its operator, in the registry, is the module's class, and the module is the first argument."""

    def __init__(self, form: OutputFormat) -> None:
        super().__init__()
        self.form = form

    def keep(self, x: Tensor) -> Tensor:
        return self.form.stored.of(x) != 0

    def settings(self) -> dict[str, float]:
        raise Refused("the format of an output", "a folder cannot hold it", "detach it first with rarefy.core.attach.detach_gates, and set it again after loading")

    def around(self, run: Callable[..., Any], host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.form.stored.call(plain_type(host), (host, *args), kwargs, gradient=self.form.gradient, dense=run)


def follow(model: nn.Module, optimizer: Optimizer) -> None:
    """After each step of the optimizer, let every weight of `set_formats` that it owns keep its pattern or choose it anew."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for weight, view in viewed(model).values():
            if isinstance(view, Laid) and id(weight) in owned:
                view.refresh(weight, Progress())

    optimizer.register_step_post_hook(after)
