"""A character model of gated blocks with squared ReLU, whose matrices may read activations of length one; seconds on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.core.modes import evaluating
from rarefy.core.roles import Task
from rarefy.tasks.char_lm import CharLM


class UnitLinear(nn.Linear):
    """``y = W x / ||x||_2 + b``: a gate on its input comes first, so that what is kept has length one whatever was dropped."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.normalize(x, dim=-1))


class SquaredReluBlock(nn.Module):
    """``x + W_down (relu(W_gate n)^2 * W_up n)``, n = LayerNorm(x)."""

    def __init__(self, width: int, kind: type[nn.Linear]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up, self.down = kind(width, 2 * width), kind(width, 2 * width), kind(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + self.down(F.relu(self.gate(n)).square() * self.up(n))


class SquaredReluCharacters(nn.Module):
    """Embed 12 characters, mix them, `depth` blocks, read out 128 logits: [R, 12] -> [R, 128]."""

    def __init__(self, width: int, depth: int, kind: type[nn.Linear]) -> None:
        super().__init__()
        self.embed, self.mix, self.norm, self.read = nn.Embedding(128, 16), nn.Linear(16 * 12, width), nn.LayerNorm(width), nn.Linear(width, 128)
        self.blocks = nn.ModuleList(SquaredReluBlock(width, kind) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(self.embed(x).flatten(1))
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.read(self.norm(h))
        return out


@dataclass(frozen=True)
class SquaredReluLM(Task):
    """Predict the next ASCII character of Python's help texts; loss and held-out figures as `CharLM`, without its balance term.

    >>> tuple(SquaredReluLM().model(0)(torch.zeros(2, 12, dtype=torch.long)).shape)
    (2, 128)
    """

    width: int = 64
    depth: int = 6
    unit: bool = True
    text: CharLM = field(default_factory=CharLM)
    name = "squared_relu_lm"

    def model(self, seed: int, **options: Any) -> nn.Module:
        """`depth` blocks; the caller's random state is left as it was. Options: width, depth, unit (matrices are UnitLinear)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            kind = UnitLinear if options.get("unit", self.unit) else nn.Linear
            return SquaredReluCharacters(int(options.get("width", self.width)), int(options.get("depth", self.depth)), kind)

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        return self.text.batch(seed, step)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy in [0, 1] and loss in nats per character on 2048 held-out places."""
        x, y = self.text.held_out()
        with evaluating(model):
            logits = model(x)
        return {"accuracy": float((logits.argmax(1) == y).float().mean()), "loss": float(F.cross_entropy(logits, y))}
