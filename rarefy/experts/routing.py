"""Small operations on a `Routing` that several parts need."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, finfo

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Routing, Scores


def keep(routing: Routing, mask: Tensor) -> Routing:
    """Assign to nobody where `mask` [N] is False, and count per expert [E] what was lost; shapes stay as they are.

    >>> r = keep(Routing(torch.tensor([0, 1]), torch.ones(2), 2, 2, k=1), torch.tensor([True, False]))
    >>> r.expert.tolist(), r.weight.tolist(), r.dropped.tolist()
    ([0, 2], [1.0, 0.0], [0, 1])
    """
    lost = routing.count(~mask)
    dropped = lost if routing.dropped is None else routing.dropped + lost
    return replace(routing, expert=routing.expert.where(mask, routing.experts), weight=routing.weight.masked_fill(~mask, 0.0), dropped=dropped)


def unpadded(routing: Routing, valid: Tensor | None) -> Routing:
    """Send the assignments of padding (`valid` [R] False) to nobody, without counting them as dropped.

    >>> unpadded(Routing(torch.tensor([0, 1]), torch.ones(2), 2, 2, k=1), torch.tensor([True, False])).expert.tolist()
    [0, 2]
    """
    if valid is None:
        return routing
    real = valid.reshape(-1)[routing.rows()]
    return replace(routing, expert=routing.expert.where(real, routing.experts), weight=routing.weight.masked_fill(~real, 0.0))


def unpadded_rows(y: Tensor, valid: Tensor | None) -> Tensor:
    """Rows y [R, d] with those of padding (`valid` [R] False) zero.

    >>> unpadded_rows(torch.ones(2, 1), torch.tensor([True, False])).tolist()
    [[1.0], [0.0]]
    """
    return y if valid is None else y.masked_fill(~valid.reshape(-1, 1), 0.0)


def dense(routing: Routing) -> Tensor:
    """The combine weights as a matrix [R, E]; several assignments of one row to one expert add up.

    >>> dense(Routing(torch.tensor([1, 2]), torch.tensor([0.5, 9.0]), 2, 2, k=1)).tolist()
    [[0.0, 0.5], [0.0, 0.0]]
    """
    out = routing.weight.new_zeros(routing.items, routing.experts + 1)
    return out.index_put((routing.rows(), routing.expert), routing.weight, accumulate=True)[:, : routing.experts]


def probabilities(logits: Tensor, live: Tensor | None) -> Tensor:
    """Softmax [R, E] over the live experts [E]; a dead expert gets exactly 0, and all get 0 where nobody is live.

    >>> probabilities(torch.zeros(1, 2), torch.tensor([True, False])).tolist()
    [[1.0, 0.0]]
    """
    if live is None:
        return logits.softmax(-1)
    return logits.masked_fill(~live, finfo(logits.dtype).min).softmax(-1) * live


def alive(expert: Tensor, live: Tensor | None) -> Tensor:
    """Experts [...] with every dead one replaced by the sentinel E, which stays."""
    return expert if live is None else expert.where(torch.cat([live, live.new_zeros(1)])[expert], live.numel())


def row_major(scores: Scores, context: Context, expert: Tensor, weight: Tensor) -> Routing:
    """The routing of expert [R, k] and weight [R, k], first choice first; what is dead, padding or E already goes to nobody with weight 0.

    >>> chosen = torch.tensor([[1, 0], [0, 2]])
    >>> r = row_major(Scores(torch.zeros(2, 2)), Context(live=torch.tensor([True, False])), chosen, torch.ones(2, 2))
    >>> r.expert.tolist(), r.weight.tolist(), r.k
    ([2, 0, 0, 2], [0.0, 1.0, 1.0, 0.0], 2)
    """
    (items, k), experts = expert.shape, scores.logits.shape[1]
    expert = alive(expert, context.live)
    if context.valid is not None:
        expert = expert.where(context.valid.reshape(-1, 1), experts)
    weight = weight.masked_fill(expert == experts, 0.0)
    return Routing(expert.flatten(), weight.flatten(), items, experts, k, scores=scores)


def positive(scores: Scores, context: Context) -> Routing:
    """Every expert that scores above zero, at its score: R*E assignments, the others' to nobody.

    >>> r = positive(Scores(torch.tensor([[0.5, -1.0], [0.0, 2.0]])), Context())
    >>> r.expert.tolist(), r.weight.tolist()
    ([0, 2, 2, 1], [0.5, 0.0, 0.0, 2.0])
    """
    weight, experts = scores.logits.float(), scores.logits.shape[1]
    each = torch.arange(experts, device=weight.device).expand_as(weight)
    return row_major(scores, context, each.where(weight > 0, experts), weight)


def need_k(k: int, experts: int) -> None:
    """Refuse a number of experts per row that there are not.

    Raises:
        BadInput: k outside 1..E.
    """
    if not 1 <= k <= experts:
        raise BadInput(f"k = {k} with {experts} experts", "a row takes between one and all of the experts", "choose k in 1..E")


def at_most(k: int, routing: Routing) -> dict[str, bool]:
    """The invariant of a choice of k experts, as `Choice.invariants` gives it."""
    return {f"at most {k} experts per row": bool((per_row(routing) <= k).all())}


def real_rows(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Bool [R] of rows [R, ...], False at padding (`valid` [R] False).

    >>> real_rows(torch.zeros(2, 3), None).tolist()
    [True, True]
    """
    return torch.ones(len(rows), dtype=torch.bool, device=rows.device) if valid is None else valid.reshape(-1)


def ranked(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per row the values in descending order (equals by lower index), whose they are, and the sum of those before: three of [R, E].

    >>> [t.tolist() for t in ranked(torch.tensor([[0.25, 0.5, 0.25]]))]
    [[[0.5, 0.25, 0.25]], [[1, 0, 2]], [[0.0, 0.5, 0.75]]]
    """
    value, index = p.sort(stable=True, dim=-1, descending=True)  # topk leaves the order of equals open
    before = value.detach().cumsum(-1).roll(1, -1)
    before[:, :1] = 0.0
    return value, index, before


def per_row(routing: Routing) -> Tensor:
    """How many experts serve each row, [R].

    >>> per_row(Routing(torch.tensor([0, 1, 1, 2]), torch.ones(4), 2, 2, k=2)).tolist()
    [2, 1]
    """
    zeros = torch.zeros(routing.items, dtype=torch.long, device=routing.expert.device)
    return zeros.scatter_add(0, routing.rows(), (routing.expert < routing.experts).long())
