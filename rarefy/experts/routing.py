"""Small operations on a `Routing` that several parts need."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, finfo

from rarefy.core.records import Routing


def keep(routing: Routing, mask: Tensor) -> Routing:
    """Assign to nobody where `mask` [N] is False, and count per expert [E] what was lost; shapes stay as they are.

    >>> import torch
    >>> r = keep(Routing(torch.tensor([0, 1]), torch.ones(2), 2, 2, k=1), torch.tensor([True, False]))
    >>> r.expert.tolist(), r.weight.tolist(), r.dropped.tolist()
    ([0, 2], [1.0, 0.0], [0, 1])
    """
    lost = routing.count(~mask)
    dropped = lost if routing.dropped is None else routing.dropped + lost
    return replace(routing, expert=routing.expert.where(mask, routing.experts), weight=routing.weight.masked_fill(~mask, 0.0), dropped=dropped)


def unpadded(routing: Routing, valid: Tensor | None) -> Routing:
    """Send the assignments of padding (`valid` [R] False) to nobody, without counting them as dropped.

    >>> import torch
    >>> unpadded(Routing(torch.tensor([0, 1]), torch.ones(2), 2, 2, k=1), torch.tensor([True, False])).expert.tolist()
    [0, 2]
    """
    if valid is None:
        return routing
    real = valid.reshape(-1)[routing.rows()]
    return replace(routing, expert=routing.expert.where(real, routing.experts), weight=routing.weight.masked_fill(~real, 0.0))


def dense(routing: Routing) -> Tensor:
    """The combine weights as a matrix [R, E]; several assignments of one row to one expert add up.

    >>> import torch
    >>> dense(Routing(torch.tensor([1, 2]), torch.tensor([0.5, 9.0]), 2, 2, k=1)).tolist()
    [[0.0, 0.5], [0.0, 0.0]]
    """
    out = routing.weight.new_zeros(routing.items, routing.experts + 1)
    return out.index_put((routing.rows(), routing.expert), routing.weight, accumulate=True)[:, : routing.experts]


def probabilities(logits: Tensor, live: Tensor | None) -> Tensor:
    """Softmax [R, E] over the live experts [E]; a dead expert gets exactly 0, and all get 0 where nobody is live.

    >>> import torch
    >>> probabilities(torch.zeros(1, 2), torch.tensor([True, False])).tolist()
    [[1.0, 0.0]]
    """
    if live is None:
        return logits.softmax(-1)
    return logits.masked_fill(~live, finfo(logits.dtype).min).softmax(-1) * live


def alive(expert: Tensor, live: Tensor | None) -> Tensor:
    """Experts [...] with every dead one replaced by the sentinel E."""
    return expert if live is None else expert.where(live[expert], live.numel())
