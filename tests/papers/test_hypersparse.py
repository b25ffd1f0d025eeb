"""HyperSparse: a pull with a value of zero, the largest weights that take everything over, and a stop that the training itself decides."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.discover import train_recipes
from rarefy.core.errors import BadInput
from rarefy.core.exact import keep_count, topk_mask
from rarefy.core.records import Event, Phase, Progress
from rarefy.core.roles import Trigger
from rarefy.tasks.digits import Digits
from rarefy.weights.penalties import GradientPenalty
from rarefy.weights.penalties.hypersparse import HYPERSPARSE, HyperSparse
from rarefy.weights.schedules.drops import Drops
from rarefy.weights.sparsifier import Sparsifier
from rarefy.weights.train import train
from rarefy.weights.triggers.pruned_beats_dense import PrunedBeatsDense
from tests.evidence import check

DENSITY, STEPS, TASK = 0.05, 300, Digits()
KEPT = keep_count(8832, DENSITY)
PULL = "the closed form is autograd's gradient of a loss whose value is zero, falls with the magnitude, and fastest at the cut of the whole model"
SHARE = "on digits, the share of the magnitude that the largest 5% hold rises in every round, ends above 0.6, and is below 0.3 under L2 on the same schedule"
STOP = "on digits, training ends the squeeze early, where the cut model's accuracy over the training batches is no lower than the dense one's"


def as_a_loss(weights: dict[str, Tensor], density: float) -> Tensor:
    """The regulariser as it is written, for autograd: its slope through the sum of tanh alone."""
    w = torch.cat([v.abs().flatten() for v in weights.values()])
    s = 0.6585 / w.detach().sort().values[w.numel() - keep_count(w.numel(), density)]
    squashed = torch.tanh(s * w).sum()
    return w.sum() * squashed / squashed.detach() - (w.sum() * squashed.detach() / squashed.detach())


def literally(weights: dict[str, Tensor], density: float) -> Tensor:
    """Term by term: each |w_i| times the sum, over the sum held constant, less |w_i|."""
    w = torch.cat([v.abs().flatten() for v in weights.values()])
    s = 0.6585 / w.detach().sort().values[w.numel() - keep_count(w.numel(), density)]
    squashed = torch.tanh(s * w).sum()
    return (w * squashed / squashed.detach()).sum() - w.sum()


def pull_holds(part: GradientPenalty) -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(30, 40, dtype=torch.float64, requires_grad=True), "b": (0.1 * torch.randn(50, 6, dtype=torch.float64)).requires_grad_()}
    value = literally(weights, 0.1)
    value.backward()
    sizes = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    assert abs(float(value)) < 1e-4 * float(sizes.sum())
    found = part.edit(weights, {k: torch.zeros_like(w) for k, w in weights.items()}, {}, Progress())
    for key, w in weights.items():
        assert torch.allclose(found[key], w.grad, rtol=1e-5, atol=1e-8), key
    order = sizes.argsort()
    pulls = torch.cat([g.abs().flatten() for g in found.values()])[order]
    assert (pulls[1:] < pulls[:-1]).all()
    slope = (pulls[1:] - pulls[:-1]) / (sizes[order][1:] - sizes[order][:-1])
    assert abs(float(sizes[order][int(slope.argmin())]) / float(sizes[order][1350]) - 1) < 0.05


class EachLayer(HyperSparse):
    """The twin: every layer has a boundary of its own."""

    name = "each-layer"

    def edit(self, weights: Any, gradients: Any, support: Any, progress: Any) -> dict[str, Tensor]:
        return {k: super(EachLayer, self).edit({k: w}, {k: gradients[k]}, {}, progress)[k] for k, w in weights.items()}


class Penalised(HyperSparse):
    """The twin: the value, which is zero, is taken for the penalty and differentiated whole."""

    name = "penalised"

    def edit(self, weights: Any, gradients: Any, support: Any, progress: Any) -> dict[str, Tensor]:
        return {k: g + 0.0 for k, g in gradients.items()}


@check("hypersparse", PULL, kind="method")
def test_the_pull() -> None:
    pull_holds(HyperSparse(0.1, strength=1.0))


@check("hypersparse", PULL, kind="twin")
@pytest.mark.parametrize("twin", [EachLayer, Penalised])
def test_another_boundary_or_the_value_is_not(twin: type[HyperSparse]) -> None:
    with pytest.raises(AssertionError):
        pull_holds(twin(0.1, strength=1.0))


@dataclass
class Seen:
    """What a training showed: the share of the largest after every round, and accuracies over the training batches at the stop."""

    shares: list[float]
    rounds: int
    dense: float
    cut: float


def accuracy(model: nn.Module) -> float:
    pairs = [TASK.batch(0, step) for step in range(8)]
    return sum(float((model(x).argmax(1) == y).float().mean()) for x, y in pairs) / 8


def squeezed(change: Callable[[Phase], Phase] = lambda phase: phase) -> Seen:
    model = TASK.model(0)
    phases = [change(phase) if phase.name == "squeeze" else phase for phase in HYPERSPARSE.phases(DENSITY, STEPS)]
    every = HYPERSPARSE.phases(DENSITY, STEPS)[1].until.every
    sp = Sparsifier(model, phases, total=STEPS, batches=[TASK.batch(0, step) for step in range(8)], batch_loss=TASK.loss)
    optimizer = TASK.optimizer(model.parameters())
    sp.attach(optimizer)
    seen, before = Seen([], 0, 0.0, 0.0), copy.deepcopy(model)
    step = 0
    while sp.phase.name != "fine-tune":
        optimizer.zero_grad()
        sp.loss(TASK.loss(model, TASK.batch(0, step))).backward()
        handle = optimizer.register_step_pre_hook(lambda *_: None)
        optimizer.step()
        handle.remove()
        step += 1
        if sp.phase.name == "squeeze" and sp.progress.phase_step % every == 0:
            before = copy.deepcopy(model)
            sizes = torch.cat([w.detach().abs().flatten() for w in sp.weights.values()])
            seen.shares.append(float(sizes[topk_mask(sizes, KEPT)].sum() / sizes.sum()))
    seen.rounds, seen.dense, seen.cut = len(seen.shares), accuracy(before), accuracy(model)
    assert sum(sp.support.counts().values()) == KEPT == sum(int((w != 0).sum()) for w in sp.weights.values())
    return seen
