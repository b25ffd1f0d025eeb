"""The grid of the int4-asymmetric layout, in a form that learns: what these functions make, the layout stores without a change.

Groups are [..., 32], of a matrix [O, G, 32], the last of a row filled up with zeros, as the layout does. Every group uses code 0 for its least
entry and code 15 for its largest, which is what the layout reads the grid off. A group that holds zeros (pruned places, or the filling)
has a scale of 7 significant bits and ``zero = -k scale``: code k then is exactly zero. All of this holds for float32 weights whose
scales are normal float16 numbers, 6e-5 to 4e3; below that the layout's own rounding comes on top.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.kernels.grouped.reference import GROUP

LAST = 15
_LEAST = 2.0**-24  # the smallest float16


class _Straight(torch.autograd.Function):
    """The second argument forward, the first one's gradient backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, shown: Tensor) -> Tensor:
        return shown.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight(value: Tensor, shown: Tensor) -> Tensor:
    """`shown`, exactly, with the gradient of `value`.

    >>> x = torch.tensor([0.4], requires_grad=True); y = straight(3 * x, x.round()); y.backward(); y.item(), x.grad.item()
    (0.0, 3.0)
    """
    found: Tensor = _Straight.apply(value, shown.detach())
    return found


def grouped(weight: Tensor) -> Tensor:
    """[O, I] as float32 groups [O, G, 32]."""
    return F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))


def flat(groups: Tensor, columns: int) -> Tensor:
    return groups.flatten(1)[:, :columns]


def spread(groups: Tensor, present: Tensor) -> Tensor:
    """Groups [N, 32] to their places among [O, G, 32], the others zero."""
    return groups.new_zeros(*present.shape, GROUP).masked_scatter(present[..., None], groups)


def half(x: Tensor) -> Tensor:
    """Rounded to float16, straight through."""
    return straight(x, x.half().float())


def coarse(x: Tensor) -> Tensor:
    """Positive numbers rounded to 7 significant bits, so that k times one is a float16 for k up to 15; straight through.

    >>> s = coarse(torch.tensor([0.123456])); torch.equal((15 * s).half().float(), 15 * s)
    True
    """
    mantissa, exponent = torch.frexp(x)
    rounded = torch.ldexp((mantissa * 128).round() / 128, exponent).half().float()
    return straight(x, torch.where(x > 0, rounded.clamp_min(_LEAST), 0.0))


def steps(low: Tensor, high: Tensor, holey: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero), both [...], of groups between `low` and `high`; `holey` ones hold zeros."""
    wide = (high - low) / LAST
    thin = coarse(wide)
    at = (-low / torch.where(thin > 0, thin, 1.0)).round().clamp(0, LAST).detach()
    return torch.where(holey, thin, half(wide)), torch.where(holey, -at * thin, half(low))


def codes(groups: Tensor, kept: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest code of every entry, float32 integers 0 to 15 [..., 32]; both ends are used, and no `kept` entry of a holey group is coded as zero."""
    step, start = scale[..., None], zero[..., None]
    nearest = torch.where(step > 0, (groups - start) / torch.where(step > 0, step, 1.0), 0.0).round().clamp(0, LAST)
    nearest = torch.where(groups == groups.amin(-1, keepdim=True), 0.0, nearest)
    nearest = torch.where((groups == groups.amax(-1, keepdim=True)) & (step > 0), float(LAST), nearest)
    aside = nearest + torch.where(groups > 0, 1.0, -1.0)
    aside = torch.where((aside < 0) | (aside > LAST), 2 * nearest - aside, aside)
    vanished = kept & ~kept.all(-1, keepdim=True) & (step > 0) & (step * nearest + start == 0)
    return torch.where(vanished, aside, nearest)


def values(code: Tensor, kept: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """``w = scale * code + zero``, [..., 32], zero where not `kept`; a zero that would make a kept entry vanish moves by its last bit."""
    vanished = (kept & (scale[..., None] * code + zero[..., None] == 0)).any(-1) & kept.all(-1)
    moved = straight(zero, torch.where(zero == 0, _LEAST, (zero * (1 + 2.0**-10)).half().float()))
    start = torch.where(vanished, moved, zero)
    return torch.where(kept, scale[..., None] * code + start[..., None], 0.0)
