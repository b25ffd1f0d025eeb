"""What a race asks of a contestant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from rarefy.core.errors import Refused


class Died(Refused):
    """What runs a model ended its process: the race goes on without it."""


class Racer(Protocol):
    """A model with what runs it."""

    name: str  # in the table
    engine: str  # what runs it, with its version
    precision: str  # how its matrices' values are stored, e.g. "float32" or "int4, head int8"
    density: float  # the share of the block matrices' weights that is stored and not zero
    model_bytes: int  # resident weights
    vocabulary: int
    tokenizer: Any  # of transformers, or None

    def time(self, prompt: Tensor, tokens: int) -> float:
        """Seconds a token of greedy decoding after the prompt [1, T]."""

    def nll(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """Nats of every token but the first of each window [T], from an empty cache, by the engine's own arithmetic; float64 [T - 1]."""
