"""How unevenly the experts of a mixture work, and what a capacity costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Entry


def expert_load(entries: Sequence[Entry]) -> dict[str, Any]:
    """{assignments served, dropped (a share of those that came), busiest: the most that one expert serves, over the mean of what came to its layer's experts}.

    `entries` are those of a Trace, a layer's call each: `busiest` is the largest of all calls, because a layer waits for its slowest expert.

    Raises:
        BadInput: no entry.

    >>> import torch
    >>> from rarefy.core.records import Context, Routing
    >>> routing = Routing(torch.tensor([0, 0, 0, 1, 2]), torch.ones(5), 5, 2, k=1, dropped=torch.tensor([1, 0]))
    >>> expert_load([Entry("layer", 0, None, routing, Context())])
    {'assignments': 4, 'dropped': 0.2, 'busiest': 1.2}
    """
    if not entries:
        raise BadInput("an expert load without entries", "it is measured over a forward", "run the model inside the Trace")
    served, dropped = ([_sum(each) for each in found] for found in ([e.routing.counts() for e in entries], [e.routing.dropped for e in entries]))
    came = [s + d for s, d in zip(served, dropped, strict=True)]
    busiest = max(int(e.routing.counts().max()) * e.routing.experts / max(1, c) for e, c in zip(entries, came, strict=True))
    return {"assignments": sum(served), "dropped": sum(dropped) / max(1, sum(came)), "busiest": busiest}


def _sum(counts: Tensor | None) -> int:
    return 0 if counts is None else int(counts.sum())


def usage(load: Tensor) -> dict[str, float]:
    """{used: the share of experts that served anybody, unevenness: the divergence of their shares from equal ones, in nats} of loads [E].

    ``unevenness = sum_e p_e log(E p_e)``: 0 where all serve as many, log E where one serves all. Source: He, arXiv 2407.04153.

    >>> import torch
    >>> usage(torch.tensor([3, 3, 0, 0]))
    {'used': 0.5, 'unevenness': 0.6931...}
    """
    p = load.double() / load.sum().clamp(min=1)
    return {"used": float((load > 0).double().mean()), "unevenness": float((p * (p * len(p)).clamp(min=1e-300).log()).sum())}
