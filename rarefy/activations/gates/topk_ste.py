"""Top-k, straight through: the largest of a token or of each block of it; the gradient passes everywhere."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.exact import keep_count
from rarefy.core.roles import Gate


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class StraightTopK(Gate):
    """Keep the ``k = round(density * M)`` largest magnitudes of every M activations; the gradient is that of no gate at all.

    ``y = x * m, m = 1 at the k largest |x| of each block of M;  dL/dx = dL/dy, nowhere masked``

    x is [..., C] and M = `block`, or C where that is 0; C must be a multiple of M, and without a block anything goes.
    Ties go to the lower index. A weight behind the gate learns from the masked activations, as they are in its own input.

    Raises:
        BadInput: a density outside [0, 1]; a block that is negative or does not divide C.

    >>> x = torch.tensor([[1.0, -3.0, 2.0, -2.0]], requires_grad=True)
    >>> y = StraightTopK(0.5, block=2)(x); y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([[0.0, -3.0, 2.0, 0.0]], [[1.0, 1.0, 1.0, 1.0]])
    """

    name: ClassVar[str] = "straight-topk"
    straight: ClassVar[bool] = True

    def __init__(self, density: float = 1.0, block: int = 0) -> None:
        super().__init__()
        keep_count(1, density)
        if int(block) != block or block < 0:
            raise BadInput(f"block {block}", "a block is a number of activations, 0 for the whole token")
        self.density, self.block = float(density), int(block)

    @classmethod
    def examples(cls) -> tuple[StraightTopK, ...]:
        return cls(), cls(0.5), cls(0.1), cls(0.0)

    def keep(self, x: Tensor) -> Tensor:
        width = self.block or x.shape[-1]
        if width and x.shape[-1] % width:
            raise BadInput(f"{x.shape[-1]} activations in blocks of {width}", "every block is whole", "pass a block that divides them")
        count = keep_count(width, self.density)
        if count == width:
            return torch.ones_like(x, dtype=torch.bool)
        blocks = x.detach().abs().unflatten(-1, (-1, width))
        order = blocks.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        return torch.zeros_like(blocks, dtype=torch.bool).scatter(-1, order, True).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Straight.apply(x, self.keep(x))
        return found

    def settings(self) -> dict[str, float]:
        return {"density": self.density, "block": self.block}

    def extra_repr(self) -> str:
        return f"density={self.density}, block={self.block}"
