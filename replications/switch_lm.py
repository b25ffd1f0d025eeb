"""Switch, 8 experts top-1, against the dense model of the same active FLOPs: held-out loss after equal steps, three seeds.

The dense baseline is the same layer with one expert, which is exactly the feed-forward layer (its weight is p = 1).
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from rarefy.tasks.char_lm import CharLM

SLUG = "switch"
NAME = "8 experts beat the FLOP-matched dense model on a character LM, mean of 3 seeds"
SOURCES = (
    "rarefy/tasks/char_lm.py",
    "rarefy/experts/moe.py",
    "rarefy/experts/dispatch.py",
    "rarefy/experts/routers/switch.py",
    "rarefy/experts/routers/linear.py",
    "rarefy/experts/balance/switch_balance.py",
    "rarefy/experts/overflow/capacity.py",
    "rarefy/experts/banks/glu.py",
)
SEEDS, STEPS, RATE = (0, 1, 2), 4000, 2e-3


def train(experts: int, seed: int) -> float:
    """Held-out nats per character after STEPS steps of AdamW on the same batches."""
    task = CharLM(width=64, experts=experts)
    model = task.model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    torch.manual_seed(seed)
    for step in range(STEPS):
        loss: Tensor = task.loss(model, task.batch(seed, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return task.evaluate(model)["loss"]


def run() -> tuple[dict[str, Any], bool]:
    """({losses of each seed, mean and spread of the difference}, whether the mean over seeds is lower with experts)."""
    losses = {name: [train(experts, seed) for seed in SEEDS] for name, experts in (("switch", 8), ("dense", 1))}
    difference = [s - d for s, d in zip(losses["switch"], losses["dense"], strict=True)]
    mean, std = statistics.mean(difference), statistics.stdev(difference)
    return {"loss": losses, "difference_mean": mean, "difference_std": std, "steps": STEPS, "seeds": list(SEEDS)}, mean < 0
