"""What a search is to win: one figure of a measured form, the least of which is best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """`cost` of a measured row; `gates`: whether skipping activations can lower it."""

    cost: Callable[[Mapping[str, Any]], float]
    gates: bool


# sparse-speed: a form with nothing left out is 1 against itself, so that one is chosen only if it was faster in every round.
TARGETS = {
    "speed": Target(lambda row: float(row["ms_per_token"]), gates=True),
    "size": Target(lambda row: float(row["file_bytes"]), gates=False),
    "memory": Target(lambda row: float(row["model_bytes"]), gates=False),
    "sparse-speed": Target(lambda row: -float(row["over_base_min"]), gates=True),
}
