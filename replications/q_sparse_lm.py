"""Q-Sparse, 40% of every matrix's input zero, trained from scratch, against the dense model: held-out loss after equal steps, three seeds.

Besides, the same gates without the straight-through gradient, and both at half of the activations.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rarefy.activations.apply import apply_gating
from rarefy.activations.gates.topk import TopK
from rarefy.activations.gates.topk_ste import StraightTopK
from rarefy.activations.ledger import measure
from rarefy.activations.places.block_inputs import BlockInputs
from rarefy.activations.sharing.even import Even
from rarefy.core.records import Gating
from rarefy.core.roles import Gate
from rarefy.tasks.squared_relu_lm import SquaredReluLM

SLUG = "q-sparse"
NAME = "40% zero activations cost a character LM at most 2% of the dense loss at equal steps, mean of 3 seeds"
SOURCES = (
    "rarefy/tasks/squared_relu_lm.py",
    "rarefy/tasks/char_lm.py",
    "rarefy/activations/apply.py",
    "rarefy/activations/ledger.py",
    "rarefy/activations/watch.py",
    "rarefy/activations/gates/topk_ste.py",
    "rarefy/activations/gates/topk.py",
    "rarefy/activations/places/block_inputs.py",
)
SEEDS, STEPS, RATE = (0, 1, 2), 1500, 2e-3


def train(seed: int, unit: bool, gate: Callable[[float], Gate] | None = None, density: float = 1.0) -> tuple[float, float]:
    """(held-out nats per character after STEPS steps of AdamW on the same batches, the share of multiply-adds executed)."""
    task = SquaredReluLM(unit=unit)
    model = task.model(seed)
    seen = [task.batch(seed, -1)[0]]
    if gate is not None:
        apply_gating(model, Gating("trial", ((BlockInputs(), gate),), Even(), density), seen, seen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        loss: Tensor = task.loss(model, task.batch(seed, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return task.evaluate(model)["loss"], measure(model, seen).record()["mac_density"]


def run() -> tuple[dict[str, Any], bool]:
    """(losses of each seed and the share of multiply-adds, whether the mean loss is at most 2% above the dense one)."""
    settings: dict[str, tuple[Any, ...]] = {
        "dense": (False,),
        "dense, inputs of length one": (True,),
        "q-sparse, 40% zero": (True, StraightTopK, 0.6),
        "q-sparse, 50% zero": (True, StraightTopK, 0.5),
        "masked gradient, 50% zero": (True, TopK, 0.5),
    }
    found = {name: [train(seed, *setting) for seed in SEEDS] for name, setting in settings.items()}
    loss = {name: [pair[0] for pair in pairs] for name, pairs in found.items()}
    share = {name: pairs[0][1] for name, pairs in found.items()}
    ratio = statistics.mean(loss["q-sparse, 40% zero"]) / statistics.mean(loss["dense"])
    return {"loss": loss, "mac_share": share, "ratio": ratio, "steps": STEPS, "seeds": list(SEEDS)}, ratio <= 1.02
