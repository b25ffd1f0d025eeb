"""What routed layers add to the task's loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.core.records import Entry
from rarefy.core.roles import Balance


def auxiliary(entries: Sequence[Entry], balances: Sequence[Balance]) -> Tensor | float:
    """The sum over what was seen of every balance loss, and of the losses that an affinity gave along with its scores; 0.0 for none.

    >>> from rarefy.core.records import Context, Routing, Scores
    >>> scores = Scores(torch.zeros(2, 2), losses={"entropy": torch.tensor(0.5)})
    >>> entry = Entry("layer", 0, None, Routing(torch.tensor([0, 1]), torch.ones(2), 2, 2, k=1, scores=scores), Context())
    >>> float(auxiliary([entry], ()))
    0.5
    """
    found = [balance(entry) for balance in balances for entry in entries]
    found += [loss for entry in entries if entry.routing.scores is not None for loss in entry.routing.scores.losses.values()]
    return torch.stack(found).sum() if found else 0.0
