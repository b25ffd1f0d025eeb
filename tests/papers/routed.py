"""What routing papers are checked on: a small routed character model, and a bank that counts the rows that it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.core.records import Entry, Rows
from rarefy.core.roles import Balance
from rarefy.core.trace import Trace
from rarefy.experts.banks.glu import GLU
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


class Counting(GLU):
    """A bank that counts the rows that its experts run."""

    rows = 0

    def split(self) -> Any:
        def counted(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            self.rows += x.shape[0]
            return f(x)

        return [partial(counted, f) for f in super().split()]

    def grouped(self, rows: Rows) -> Tensor:
        self.rows += int(rows.offsets[-1])
        return super().grouped(rows)
