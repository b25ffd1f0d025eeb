"""The small routed character model that routing papers are checked on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.core.records import Entry
from rarefy.core.roles import Balance
from rarefy.core.trace import Trace
from rarefy.tasks.char_lm import CharLM

LAST = 20  # steps whose records are kept


def trained(router: str, balances: Sequence[Balance], steps: int = 60, seed: int = 0) -> tuple[nn.Module, list[Entry], list[Entry]]:
    """The model after `steps` of SGD, and the records of the first and of the last LAST steps."""
    task = CharLM(width=16, rows=64, router=router)
    model, entries = task.model(seed), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in range(steps):
            x, y = task.batch(seed, step)
            with Trace(model) as trace:
                loss = F.cross_entropy(model(x), y)
            (entry,) = trace.entries
            for balance in balances:
                loss = loss + balance(entry)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            entries.append(entry)
    return model, entries[:LAST], entries[-LAST:]


def load(entries: Sequence[Entry]) -> Tensor:
    """Assignments per expert in all, [E]."""
    return torch.stack([entry.routing.counts() for entry in entries]).sum(0).float()
