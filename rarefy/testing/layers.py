"""The contract of a Layer: rows in, rows out, of any number; padding is nothing; what it declares causal is; every parameter learns."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.records import Context
from rarefy.core.roles import Layer
from rarefy.core.trace import Trace
from rarefy.experts.auxiliary import auxiliary
from rarefy.testing import figures
from rarefy.testing.contract import contract

_ROWS, _WIDTH, _EXPERTS, _INNER = 24, 8, 4, 6
_VALID = torch.arange(_ROWS) % 3 != 1


def _made(part: Layer, training: bool = False, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return part.make(_WIDTH, _EXPERTS, _INNER).train(training)


def _run(layer: nn.Module, x: Tensor, **context: Any) -> Tensor:
    """What the layer makes of x, with the same draws every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        y: Tensor = layer(x, Context(**context)) if context else layer(x)
        return y


@contract(Layer)
def rows_of_any_shape_and_type_come_out_as_they_went_in(part: Layer) -> None:
    layer, x = _made(part), figures.weight(_ROWS, _WIDTH)
    flat = _run(layer, x)
    assert flat.shape == x.shape and bool(torch.isfinite(flat).all()) and bool(flat.any()), f"{part!r} gives {tuple(flat.shape)} for {tuple(x.shape)}"
    assert torch.equal(_run(layer, x.view(4, 6, _WIDTH)), flat.view(4, 6, _WIDTH)), f"{part!r} sees how rows are laid out"
    assert _run(layer, x[:0]).shape == (0, _WIDTH) and _run(layer, x[:1]).shape == (1, _WIDTH), f"{part!r} does not take no rows, or one"
    assert _run(layer.bfloat16(), x.bfloat16()).dtype == torch.bfloat16, f"{part!r} does not keep bfloat16"


@contract(Layer)
def padding_comes_out_as_zeros_and_changes_nothing(part: Layer) -> None:
    for training in (True, False):
        layer, x = _made(part, training), figures.weight(_ROWS, _WIDTH)
        for parameter in layer.parameters():
            with torch.no_grad():
                parameter.add_(0.1)  # biases that start at zero
        first = _run(layer, x, valid=_VALID)
        assert not bool(first[~_VALID].any()) and bool(first[_VALID].any()), f"{part!r}: padding does not come out as zeros"
        for content in (-x[:1], torch.full((1, _WIDTH), 30.0)):
            assert torch.equal(_run(layer, x.where(_VALID[:, None], content), valid=_VALID), first), f"{part!r}: what padding holds changes other rows"


@contract(Layer)
def its_causal_flag_is_true_of_rows(part: Layer) -> None:
    """Later rows are changed in several ways; whether an earlier row's output ever changes is what `causal` says."""
    for training in (True, False):
        moved, says = _later_rows_matter(part, training), part.causal(training)
        assert moved is not says, f"{part!r} says causal = {says}, and later rows {'change' if moved else 'never change'} earlier ones (training = {training})"


def _later_rows_matter(part: Layer, training: bool) -> bool:
    layer = _made(part, training)
    for seed in range(6):
        x = figures.weight(_ROWS, _WIDTH, seed=seed)
        for future in (-3 * x[14:], x[13:14].expand(10, -1), figures.weight(10, _WIDTH, seed=seed + 50)):
            if not torch.allclose(_run(layer, x)[:14], _run(layer, torch.cat([x[:14], future]))[:14], atol=1e-6):
                return True
    return False


@contract(Layer)
def every_parameter_of_it_learns(part: Layer) -> None:
    layer, x = _made(part, True), figures.weight(400, _WIDTH)
    with Trace(layer) as trace:
        y = _run(layer, x)
    loss = (y * figures.weight(*y.shape, seed=2)).sum() + auxiliary(trace.entries, part.balances)
    loss.backward()
    idle = [name for name, p in layer.named_parameters() if p.requires_grad and (p.grad is None or not bool(torch.isfinite(p.grad).all()) or not bool(p.grad.any()))]
    assert not idle, f"{part!r}: no gradient for {', '.join(idle)}"


@contract(Layer)
def a_trace_sees_every_assignment(part: Layer) -> None:
    layer, x = _made(part), figures.weight(_ROWS, _WIDTH)
    with Trace(layer) as trace:
        _run(layer, x, valid=_VALID)
    served = [int(entry.routing.counts().sum()) for entry in trace.entries]
    assert served and min(served) > 0, f"{part!r} shows a Trace {served} assignments"


@contract(Layer)
def copies_and_saved_layers_are_the_same(part: Layer) -> None:
    layer, x = _made(part), figures.weight(_ROWS, _WIDTH)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    loaded = _made(part, seed=5)
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    assert all(torch.equal(_run(other, x), _run(layer, x)) for other in (copy.deepcopy(layer), loaded)), f"{part!r} does not survive a copy or its state dict"
