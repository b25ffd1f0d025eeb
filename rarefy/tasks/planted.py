"""Planted tickets: a random network that contains a known small network which solves the task exactly, to be found by pruning.

Axis legend: L layers of weights, O outputs and I inputs of a layer, m knots.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from rarefy.core.errors import BadInput
from rarefy.core.records import Paper
from rarefy.core.roles import Task

Layers = list[tuple[Tensor, Tensor]]  # (weight [O, I], bias [O]) of each layer, float64
BOUNDS, SLOPES = (0.2, 0.5, 0.7), (5.0, 10.0, 20.0, 40.0)  # where the circle's classes meet, and how steep their lines are
HELD_OUT = 1000

PAPER = Paper(
    "plant-n-seek",
    "Plant 'n' Seek: Can You Find the Winning Ticket?",
    "arXiv 2111.11153",
    (
        "a target neuron takes the best free neuron; the authors' code takes the best one, or where that is taken the first free one",
        "deeper circles add identities; the authors fold the angle",
        "deeper tickets begin with x + 1 and count their layers from one, the authors from the input",
        "recall and precision are those of the weights that are not zero at the end",
        "edge-popup, which the paper also benchmarks, is not here: any training recipe is",
        "measured here on a circle, three layers, 50 wide, at the ticket's density after 200 steps: the ticket 0.96 before training, SynFlow 0.57, chance 0.28, multishot magnitude 0.13",
    ),
)


@dataclass(frozen=True)
class Planted(Task):
    """Find the ticket planted in a random ReLU network: a ReLU unit, a circle of four classes, or a helix.

    ``y = ticket(x), x ~ U[-1, 1]^d``; the net computes y exactly where everything but the ticket is zero, before training

    `evaluate` gives accuracy (circle) or the mean squared error (the others) on 1,000 held-out points, and of the
    weights and biases that are not zero: recall (how much of the ticket is kept), precision (how much of what is kept
    is the ticket), and the ticket's density. Biases are sites too.

    Raises:
        BadInput: an unknown target, fewer than two layers, or a width that the ticket does not fit in.

    Source: Fischer and Burkholz, Plant 'n' Seek, arXiv 2111.11153, and the authors' code.

    >>> task = Planted("relu", layers=3, width=8); task.evaluate(task.model(0))["recall"]
    1.0
    """

    target: str = "circle"
    layers: int = 3
    width: int = 50
    knots: int = 10
    rows: int = 64
    noise: float = 0.0
    name = "planted"
    paper = PAPER

    def ticket(self) -> Layers:
        """The small network that solves the task."""
        if self.target not in TARGETS:
            raise BadInput(f"target {self.target!r}", f"a target is one of {', '.join(TARGETS)}")
        if self.layers < 2:
            raise BadInput(f"{self.layers} layers", "a ticket has at least two layers of weights")
        return TARGETS[self.target](self.layers, self.knots)

    def model(self, seed: int, **options: Any) -> PlantedNet:
        """The random network with the ticket in it; the caller's random state is left as it was. No options."""
        if options:
            raise BadInput(f"option {', '.join(options)} of the task {self.name}", "its model has no options", "write planted:width=30")
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws what the net then overwrites
            return PlantedNet(self.ticket(), self.width, torch.Generator().manual_seed(seed))

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Adam: the outputs are divided by small scales, and their gradients are as large as these are small."""
        return torch.optim.Adam(parameters, lr=3e-3)

    def sites(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(name for name, _ in model.named_parameters())

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """x [rows, d], y [rows] classes or [rows, O] values; noise flips classes with that chance, or adds a normal of that deviation."""
        return self._draw(self.rows, torch.Generator().manual_seed(seed * 1_000_003 + step), self.noise)

    def _draw(self, rows: int, generator: Generator, noise: float) -> tuple[Tensor, Tensor]:
        layers = self.ticket()
        x = torch.rand(rows, layers[0][0].shape[1], generator=generator) * 2 - 1
        if self.target != "circle":
            y = run(layers, x.double()).float()
            return x, y + noise * torch.randn(y.shape, generator=generator)
        classes = torch.bucketize(x.square().sum(1), torch.tensor(BOUNDS))
        flipped = torch.rand(rows, generator=generator) < noise
        return x, torch.where(flipped, torch.randint(len(SLOPES), (rows,), generator=generator), classes)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y) if self.target == "circle" else F.mse_loss(model(x), y)

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        x, y = self._draw(HELD_OUT, torch.Generator().manual_seed(-1), 0.0)
        found = model(x)
        fit = {"accuracy": float((found.argmax(1) == y).float().mean())} if self.target == "circle" else {"error": float(F.mse_loss(found, y))}
        masks = model.truth()
        truth = torch.cat([t.flatten() for t in masks.values()])
        kept = torch.cat([model.get_parameter(name).flatten() for name in masks]) != 0
        both = float((truth & kept).sum())
        return {**fit, "recall": both / float(truth.sum()), "precision": both / max(1.0, float(kept.sum())), "ticket": float(truth.sum()) / truth.numel()}


class PlantedNet(nn.Module):
    """A He-initialised ReLU network, biases included, with a ticket written into it; `truth` says where.

    Outputs are divided by the scales at which the last layer was planted, so that the ticket alone gives the target.
    """

    def __init__(self, ticket: Layers, width: int, generator: Generator) -> None:
        super().__init__()
        widest = max(w.shape[0] for w, _ in ticket[:-1])
        if width < widest:
            raise BadInput(f"width {width}", f"the ticket has layers of {widest} neurons", f"ask for width={widest} or more, or fewer knots")
        sizes = [ticket[0][0].shape[1], *[width] * (len(ticket) - 1), ticket[-1][0].shape[0]]
        source = random_layers(sizes, generator)
        masks, scale = plant(ticket, source)
        linears = [nn.Linear(i, o) for i, o in itertools.pairwise(sizes)]
        self.layers = nn.ModuleList(linears)
        self.register_buffer("scale", scale.float())
        with torch.no_grad():
            for depth, (layer, (weight, bias)) in enumerate(zip(linears, source, strict=True)):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
                self.register_buffer(f"truth_{depth}_weight", masks[depth][0], persistent=False)
                self.register_buffer(f"truth_{depth}_bias", masks[depth][1], persistent=False)

    def truth(self) -> dict[str, Tensor]:
        """{parameter name: bool mask of the ticket}."""
        return {f"layers.{depth}.{kind}": self.get_buffer(f"truth_{depth}_{kind}") for depth in range(len(self.layers)) for kind in ("weight", "bias")}

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        found: Tensor = self.layers[-1](x) / self.scale
        return found


def random_layers(sizes: list[int], generator: Generator) -> Layers:
    """Weights of deviation sqrt(2 / I), biases of the product of these over the layers so far."""
    layers, spread = [], 1.0
    for inputs, outputs in itertools.pairwise(sizes):
        deviation = math.sqrt(2 / inputs)
        spread *= deviation
        weight = deviation * torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
        layers.append((weight, spread * torch.randn(outputs, generator=generator, dtype=torch.float64)))
    return layers


def run(layers: Layers, x: Tensor) -> Tensor:
    """A ReLU network, linear at the end: x [rows, I] -> [rows, O]."""
    for weight, bias in layers[:-1]:
        x = F.relu(F.linear(x, weight, bias))
    return F.linear(x, *layers[-1])


def plant(ticket: Layers, source: Layers) -> tuple[Layers, Tensor]:
    """Write a ticket into a network in place; the masks of where it lies, and the scale [O] of each output.

    Neuron t = [b, w / scale of its inputs] goes to the free neuron whose own values on its support have its signs and
    lie nearest to lambda t, ``lambda = <t, c> / <t, t>``; there it is written as lambda t, and lambda is its scale. Where
    no neuron has its signs, the first free one takes it, at the scale of its own first weight.
    """
    scale = torch.ones(ticket[0][0].shape[1], dtype=torch.float64)
    places = torch.arange(len(scale))
    masks: Layers = []
    for depth, ((weight, bias), (host, host_bias)) in enumerate(zip(ticket, source, strict=True)):
        mask, bias_mask = torch.zeros(host.shape, dtype=torch.bool), torch.zeros(host_bias.shape, dtype=torch.bool)
        free = list(range(len(host)))
        found, scales = [], []
        for neuron, (w, b) in enumerate(zip(weight, bias, strict=True)):
            support = w.nonzero()[:, 0]
            t = torch.cat([b[None], w[support] / scale[support]])
            candidates = [neuron] if depth == len(ticket) - 1 else free
            columns = torch.cat([host_bias[candidates, None], host[candidates][:, places[support]]], 1)
            best, factor = nearest(columns, t)
            row = candidates[best]
            host[row, places[support]], host_bias[row] = factor * t[1:], factor * t[0]
            mask[row, places[support]], bias_mask[row] = True, bool(b != 0)
            free.remove(row)
            found.append(row)
            scales.append(factor)
        places, scale = torch.tensor(found), torch.tensor(scales, dtype=torch.float64)
        masks.append((mask, bias_mask))
    return masks, scale


def nearest(columns: Tensor, t: Tensor) -> tuple[int, float]:
    """Which of the candidates [N, 1 + support] is nearest to a positive multiple of t, and the multiple."""
    factors = columns @ t / t.square().sum()
    alike = (columns.sign() == t.sign())[:, t != 0].all(1) & (factors > 0)
    if not bool(alike.any()):
        return 0, float((columns[0, 1] / t[1]).abs())
    distance = torch.where(alike, (columns - factors[:, None] * t).abs().sum(1), math.inf)
    best = int(distance.argmin())
    return best, float(factors[best])


# -- targets
def piecewise(functions: list[Callable[[Tensor], Tensor]], low: float, high: float, knots: int) -> Layers:
    """One layer of alternately rising and falling units at the knots, and their sum for every function: exact at the knots, linear between."""
    at = torch.linspace(low, high, knots, dtype=torch.float64)
    sign = torch.ones(knots, dtype=torch.float64)
    sign[1::2] = -1
    beyond = torch.cat([at, at[-1:] + (at[1] - at[0])])
    rows, offsets = [], []
    for function in functions:
        slope = function(beyond).diff() / beyond.diff()
        change = torch.cat([slope[:1], slope.diff()])
        change[0] += change[1:][sign[1:] < 0].sum()
        rows.append(change)
        offsets.append(function(at[:1])[0] - (F.relu(sign * (at[0] - at)) * change).sum())
    return [(sign[:, None].clone(), -sign * at), (torch.stack(rows), torch.stack(offsets))]


def identity(width: int, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    return torch.eye(width, dtype=torch.float64), torch.full((width,), offset, dtype=torch.float64)


def relu(layers: int, knots: int) -> Layers:
    """max(x, 0) along one path."""
    return [identity(1) for _ in range(layers)]


def helix(layers: int, knots: int) -> Layers:
    """(t cos t, t sin t, t) / 8 pi with t = 5 pi + 3 pi x."""

    shift, low = (0.0, -1.0) if layers == 2 else (1.0, 0.0)

    def turn(x: Tensor) -> Tensor:
        return 5 * math.pi + 3 * math.pi * (x - shift)

    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: turn(x) * turn(x).cos() / (8 * math.pi),
        lambda x: turn(x) * turn(x).sin() / (8 * math.pi),
        lambda x: turn(x) / (8 * math.pi),
    ]
    first, second = piecewise(functions, low, low + 2, knots)
    if layers == 2:
        return [first, second]
    if layers == 3:
        return [identity(1, 1.0), first, second]
    lifted = (second[0], second[1] + 2.0)  # above zero, so that the layers after it pass it on
    return [identity(1, 1.0), first, lifted, *[identity(3) for _ in range(layers - 4)], identity(3, -2.0)]


def circle(layers: int, knots: int) -> Layers:
    """One line in r = x1^2 + x2^2 for each class, the steeper above the flatter from its boundary on."""
    shift, low = (0.0, -1.0) if layers == 2 else (1.0, 0.0)
    (weight, bias), (square, offset) = piecewise([lambda x: (x - shift).square()], low, low + 2, knots)
    weight = torch.block_diag(weight, weight)
    bias, square, offset = torch.cat([bias, bias]), torch.cat([square, square], 1), 2 * offset
    slopes = torch.tensor(SLOPES, dtype=torch.float64)
    starts = torch.cat([torch.zeros(1, dtype=torch.float64), -(slopes.diff() * torch.tensor(BOUNDS, dtype=torch.float64)).cumsum(0)])
    if layers == 2:
        return [(weight, bias), (slopes[:, None] @ square, slopes * offset + starts)]
    if layers == 3:
        return [identity(2, 1.0), (weight, bias), (slopes[:, None] @ square, slopes * offset + starts)]
    between = [identity(1) for _ in range(layers - 4)]
    return [identity(2, 1.0), (weight, bias), (square, offset), *between, (slopes[:, None], starts)]


TARGETS = {"relu": relu, "circle": circle, "helix": helix}
