"""A small chain of attention-less blocks with the matrices of a gated transformer, channels of unequal scale, and tokens to run it on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, UNITS = 24, 40


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.mlp = Mix(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.mix(self.first(x))
        found: Tensor = h + self.mlp(self.second(h))
        return found


class Mix(nn.Module):
    """q, k and v read one tensor, o what they make: causal attention of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x)[..., :8] @ self.k(x).transpose(-1, -2)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        found: Tensor = self.o(scores.masked_fill(~causal, float("-inf")).softmax(-1) @ self.v(x))
        return found


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.act = nn.Linear(WIDTH, UNITS), nn.Linear(WIDTH, UNITS), nn.Linear(UNITS, WIDTH), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return found


class Chain(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def chain(depth: int = 2, seed: int = 0) -> Chain:
    """Rows of `up` differ in scale by e^-3 to e^3, one standard deviation e: what one threshold for all does not see."""
    torch.manual_seed(seed)
    model = Chain(depth).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.up.weight.mul_(torch.randn(UNITS, 1).clamp(-3, 3).exp())
            block.mlp.down.weight.mul_(0.2)
    return model


def tokens(seed: int, count: int = 2) -> list[Tensor]:
    """`count` batches [4, 64, WIDTH], channels of unequal scale."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.3, 2, WIDTH)
    return [torch.randn(4, 64, WIDTH, generator=generator) * scale for _ in range(count)]
