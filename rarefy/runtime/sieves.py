"""What the native decoder is told of a gate: thresholds, or how many of a block are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.activations.gates.channel_threshold import ChannelThreshold
from rarefy.activations.gates.threshold import Threshold
from rarefy.activations.gates.topk import TopK
from rarefy.activations.gates.topk_ste import StraightTopK
from rarefy.core.errors import BadInput
from rarefy.core.exact import keep_count
from rarefy.core.roles import Gate


@dataclass(frozen=True)
class Sieve:
    """Entries of a row that stay: those with ``not |x| < threshold`` ([C], or [1] for all); or the `keep` largest of every `block`."""

    threshold: Tensor | None = None
    keep: int = 0
    block: int = 0


def sieve(gate: Gate, channels: int, where: str) -> Sieve:
    """The sieve that gives, bit for bit, what `gate` gives on float32 rows of so many channels.

    Raises:
        BadInput: a kind of gate that the decoder does not compute, or one that these channels do not fit.

    >>> sieve(TopK(0.25), 8, "down")
    Sieve(threshold=None, keep=2, block=8)
    """
    made = KINDS.get(type(gate))
    if made is None:
        known = ", ".join(kind.name for kind in KINDS)
        raise BadInput(f"{where} has a {type(gate).name or type(gate).__name__} gate", f"the native decoder computes {known}", "run it through transformers")
    return made(gate, channels, where)


def _thresholds(gate: Any, channels: int, where: str) -> Sieve:
    found = gate.threshold.detach().to("cpu", torch.float32).reshape(-1).contiguous()
    if found.numel() not in (1, channels):
        raise BadInput(f"{where} has {found.numel()} thresholds", f"it reads {channels} channels", "gate it again")
    return Sieve(threshold=found)


def _largest(gate: Any, channels: int, where: str) -> Sieve:
    block = getattr(gate, "block", 0) or channels
    if channels % block:
        raise BadInput(f"{where} keeps some of every {block} activations", f"it reads {channels}, which are no whole number of blocks", "gate it again")
    return Sieve(keep=keep_count(block, gate.density), block=block)


KINDS: dict[type[Gate], Callable[[Any, int, str], Sieve]] = {Threshold: _thresholds, ChannelThreshold: _thresholds, TopK: _largest, StraightTopK: _largest}
