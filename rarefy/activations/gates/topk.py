"""Top-k: every token keeps the same number of its largest activations."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rarefy.core.exact import keep_count
from rarefy.core.roles import Gate


class TopK(Gate):
    """Keep exactly ``k = round(density * C)`` largest magnitudes of each token.

    ``y_c = x_c if c is among the first k of a stable descending sort of |x|, else 0;  dL/dx_c = dL/dy_c where kept, 0 elsewhere``

    x is [..., C]; among equal magnitudes the lower index is kept, so that ties cannot change the count; NaN ranks first.

    Raises:
        BadInput: a density outside [0, 1].

    >>> TopK(0.5)(torch.tensor([[1.0, -3.0, 2.0, -2.0]])).tolist()
    [[0.0, -3.0, 2.0, 0.0]]
    """

    name: ClassVar[str] = "topk"

    def __init__(self, density: float = 1.0) -> None:
        super().__init__()
        keep_count(1, density)
        self.density = float(density)

    @classmethod
    def examples(cls) -> tuple[TopK, ...]:
        return cls(), cls(0.5), cls(0.1), cls(0.0)

    def keep(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        count = keep_count(width, self.density)
        if count == width:
            return torch.ones_like(x, dtype=torch.bool)
        order = x.detach().abs().sort(dim=-1, descending=True, stable=True).indices[..., :count]
        return torch.zeros_like(x, dtype=torch.bool).scatter(-1, order, True)

    def settings(self) -> dict[str, float]:
        return {"density": self.density}

    def extra_repr(self) -> str:
        return f"density={self.density}"
