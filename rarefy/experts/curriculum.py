"""A curriculum by routing: samples that ask for similar numbers of experts follow each other, so that no device waits in a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Entry
from rarefy.experts.routing import per_row


def complexity(entries: Sequence[Entry], samples: int) -> Tensor:
    """Per sample and layer the share of its tokens that more than one expert serves: [samples, layers], padding aside.

    `entries` are those of one forward, a layer each, with `context.owner` [R] saying whose token a row is. Source: Li et al., Adaptive
    Gating, EMNLP 2023, the complexity vector C_d.

    Raises:
        BadInput: an entry that does not say whose its rows are.
    """
    return torch.stack([_share(entry, samples) for entry in entries], 1)


def _share(entry: Entry, samples: int) -> Tensor:
    owner, valid = entry.context.owner, entry.context.valid
    if owner is None:
        raise BadInput(f"complexity of {entry.path}", "its context must say whose token a row is (owner)", "attach an Ambient to the model")
    counts = torch.ones_like(owner, dtype=torch.float32) if valid is None else valid.reshape(-1).float()
    tokens = torch.zeros(samples).index_add(0, owner, counts)
    several = torch.zeros(samples).index_add(0, owner, counts * (per_row(entry.routing) > 1))
    return several / tokens.clamp(min=1)


def similar_first(complexity: Tensor) -> Tensor:
    """An order of the samples [D]: first that of the least complexity in all, then the others by cosine similarity to it, most similar first.

    complexity [D, L]; a sample without any complexity is similar to none but those like it. Source: as for `complexity`.

    >>> similar_first(torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.1, 0.2]])).tolist()
    [2, 1, 0]
    """
    start = int(complexity.sum(1).argmin())
    likeness = torch.nn.functional.cosine_similarity(complexity, complexity[start][None], dim=1)
    likeness = likeness + ((complexity == complexity[start]).all(1)).float()  # equal vectors of zeros too
    likeness[start] = 3.0
    return likeness.argsort(stable=True, descending=True)
