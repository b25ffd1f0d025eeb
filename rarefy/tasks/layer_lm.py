"""The character model of `CharLM` with a routed layer that is more than a router over a bank; seconds on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rarefy.core.records import Context
from rarefy.core.roles import Controller, Layer, Task
from rarefy.experts.layers.competition import Competition
from rarefy.tasks.char_lm import CharLM
from rarefy.tasks.routed import routed

_SPAN, _ASCII = 12, 128


class LayeredCharacters(nn.Module):
    """Embed 12 characters, mix them, one routed layer with a residual, read out 128 logits: [R, 12] -> [R, 128]."""

    def __init__(self, width: int, experts: int, inner: int, kind: Layer) -> None:
        super().__init__()
        self.embed, self.mix, self.read = nn.Embedding(_ASCII, 16), nn.Linear(16 * _SPAN, width), nn.Linear(width, _ASCII)
        self.norm, self.layer = nn.LayerNorm(width), kind.make(width, experts, inner)
        self.balances, self.controllers = kind.balances, kind.controllers

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(self.embed(x).flatten(1))
        out: Tensor = self.read(h + self.layer(self.norm(h), Context(ids=x[:, -1])))
        return out


@dataclass(frozen=True)
class LayerLM(Task):
    """Predict the next ASCII character of Python's help texts, as `CharLM` does; `router` names any Layer, with its hyper-parameters.

    `inner` is the width within an expert (None: `width`). Numbers compare with those of `CharLM` of the same widths: text, batches and
    evaluation are its own.
    """

    width: int = 64
    experts: int = 4
    inner: int | None = None
    rows: int = 128
    router: str = Competition.name
    name = "layer_lm"

    def model(self, seed: int, **options: Any) -> nn.Module:
        """One routed layer; the caller's random state is left as it was. Options: width, experts, inner, router.

        Raises:
            BadInput: no such layer (the sentence lists what there is), one that refuses its hyper-parameters, or another option.
        """
        return routed(self, Layer, LayeredCharacters, seed, options)

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        return self._text().batch(seed, step)

    def loss(self, model: Any, batch: Any) -> Tensor:
        return self._text().loss(model, batch)

    def controllers(self, model: Any) -> tuple[Controller, ...]:
        found: tuple[Controller, ...] = model.controllers
        return found

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self._text().evaluate(model)

    def _text(self) -> CharLM:
        return CharLM(rows=self.rows)
