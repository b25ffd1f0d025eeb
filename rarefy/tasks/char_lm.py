"""A character model on the standard library's own help texts, with one routed layer; seconds on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.core.discover import part
from rarefy.core.records import Context
from rarefy.core.roles import Choice, Controller, Task
from rarefy.core.trace import Trace
from rarefy.experts.auxiliary import auxiliary
from rarefy.experts.banks.glu import GLU
from rarefy.experts.moe import MoE
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.switch import Switch
from rarefy.experts.routing import per_row

_SPAN = 12  # characters seen
_HELD_OUT = 20_000  # characters at the end that are never trained on
_ASCII = 128


@cache
def _text() -> Tensor:
    from pydoc_data.topics import topics

    text = "\n".join(topics[key] for key in sorted(topics))
    return torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()


class RoutedCharacters(nn.Module):
    """Embed 12 characters, mix them, one routed layer with a residual, read out 128 logits: [R, 12] -> [R, 128].

    `choice` routes, with the affinity, the bank, the shared experts, the overflow rule, the balance losses and the controllers that its paper trains it with.
    """

    def __init__(self, width: int, experts: int, inner: int, choice: Choice) -> None:
        super().__init__()
        self.embed, self.mix, self.read = nn.Embedding(_ASCII, 16), nn.Linear(16 * _SPAN, width), nn.Linear(width, _ASCII)
        affinity = (choice.affinity or Linear)(width, experts)
        bank, shared = (choice.bank or GLU)(experts, width, inner), choice.shared(width, inner)
        self.norm, self.moe = nn.LayerNorm(width), MoE(affinity, choice, bank, choice.overflow, shared=shared)
        self.balances, self.controllers = choice.balances, choice.controllers

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(self.embed(x).flatten(1))
        out: Tensor = self.read(h + self.moe(self.norm(h), Context(ids=x[:, -1])))
        return out


@dataclass(frozen=True)
class CharLM(Task):
    """Predict the next ASCII character of Python's help texts; the loss includes the router's balance losses.

    `router` names any Choice, with its hyper-parameters: `topk`, `top-p:p=0.5`; `inner` is the width within an expert (None: `width`). The text depends on the Python version, so compare numbers within one version only.

    >>> x, y = CharLM(rows=4).batch(0, 7); tuple(x.shape), tuple(y.shape)
    ((4, 12), (4,))
    """

    width: int = 64
    experts: int = 4
    inner: int | None = None
    rows: int = 128
    router: str = Switch.name
    name = "char_lm"

    def model(self, seed: int, **options: Any) -> nn.Module:
        """One routed layer; the caller's random state is left as it was. Options: width, experts, inner, router.

        Raises:
            BadInput: no such router (the sentence lists what there is), or one that refuses its hyper-parameters.
        """
        width, experts = (int(options.get(name, getattr(self, name))) for name in ("width", "experts"))
        inner = options.get("inner", self.inner)
        choice = part(Choice, options.get("router", self.router))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return RoutedCharacters(width, experts, width if inner is None else int(inner), choice)

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """x [rows, 12] and the character that follows, y [rows], from the training part."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return _windows(torch.randint(len(_text()) - _HELD_OUT - _SPAN, (self.rows,), generator=generator))

    def loss(self, model: Any, batch: Any) -> Tensor:
        with Trace(model) as trace:
            loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss + auxiliary(trace.entries, model.balances)

    def controllers(self, model: Any) -> tuple[Controller, ...]:
        found: tuple[Controller, ...] = model.controllers
        return found

    def held_out(self) -> tuple[Tensor, Tensor]:
        """x [2048, 12] and the character that follows, y [2048], spread over the held-out part."""
        size = len(_text())
        return _windows(torch.linspace(size - _HELD_OUT, size - _SPAN - 1, 2048).long())

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy in [0, 1], loss in nats per character and experts per character on 2048 held-out places, with the evaluation capacity."""
        x, y = self.held_out()
        training = model.training
        with Trace(model) as trace:
            logits = model.eval()(x)
        model.train(training)
        served = per_row(trace.entries[0].routing).float().mean()
        return {"accuracy": float((logits.argmax(1) == y).float().mean()), "loss": float(F.cross_entropy(logits, y)), "experts": float(served)}


def _windows(start: Tensor) -> tuple[Tensor, Tensor]:
    seen = _text()[start[:, None] + torch.arange(_SPAN + 1)]
    return seen[:, :-1], seen[:, -1]
