"""Block inputs: what every matrix of every block reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rarefy.activations.watch import is_matrix
from rarefy.core.roles import Places
from rarefy.weights.blocks import find_chain


@dataclass(frozen=True)
class BlockInputs(Places):
    """The input of every Linear (or Conv1D) inside the model's chain of blocks; of every one where there is no chain."""

    name: ClassVar[str] = "block-inputs"

    def find(self, model: nn.Module, batch: Any) -> tuple[str, ...]:
        heads = tuple(f"{path}." for path, _ in find_chain(model, batch))
        return tuple(path for path, module in model.named_modules() if is_matrix(module) and (not heads or path.startswith(heads)))
