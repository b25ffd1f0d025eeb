"""Whether a sparse model was trained enough: its fit to the training data, what is empty in it, how steady its masks are, what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.activations.watch import without_grad
from rarefy.core.collect import call
from rarefy.core.errors import BadInput
from rarefy.core.records import Event


@dataclass(frozen=True)
class Fit:
    """On training data, means over examples: cross-entropy without label smoothing [nats], accuracy, entropy of the prediction [nats]."""

    loss: float
    accuracy: float
    entropy: float


def fit(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Fit:
    """How well a classifier fits: batches of (x, y [R]), the model's output logits [R, classes].

    ``loss = -mean log p_y, entropy = -mean sum_c p_c log p_c, p = softmax(z)``

    A sparse model that is under-trained has a higher loss and stays less sure than a dense one after as many steps.
    Source: Kuznedelev et al., arXiv 2308.02060 (the measures rest on memory of the paper).

    Raises:
        BadInput: no batches.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = model.weight.data.zero_()
    >>> found = fit(model, [(torch.ones(4, 1), torch.tensor([0, 0, 0, 1]))])
    >>> round(found.loss, 4), found.accuracy, round(found.entropy, 4)
    (0.6931, 0.75, 0.6931)
    """
    loss, right, entropy, rows = 0.0, 0, 0.0, 0
    with without_grad(model):
        for x, y in batches:
            logs = F.log_softmax(call(model, x).double(), dim=-1)
            loss += float(F.nll_loss(logs, y, reduction="sum"))
            right += int((logs.argmax(-1) == y).sum())
            entropy += float(torch.special.entr(logs.exp()).sum())
            rows += y.numel()
    if not rows:
        raise BadInput("no batches", "a fit is a mean over examples", "pass at least one batch")
    return Fit(loss / rows, right / rows, entropy / rows)


def empty(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """{key: the fraction of the rows of a weight [O, ...] (filters of a convolution) that are zero throughout}.

    >>> empty({"a": torch.tensor([[0.0, 0.0], [0.0, 1.0]])})
    {'a': 0.5}
    """
    return {key: float((w.detach().flatten(1) == 0).all(1).double().mean()) for key, w in weights.items()}


def overlap(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """``sum |A and B| / sum |A or B|`` over the masks of all sites: 1 where two choices agree, 0 where they share nothing.

    Raises:
        BadInput: masks of other sites.

    >>> overlap({"a": torch.tensor([True, True, False])}, {"a": torch.tensor([False, True, True])})
    0.3333333333333333
    """
    if set(one) != set(other):
        raise BadInput(f"masks of {sorted(one)} and of {sorted(other)}", "masks are compared site for site", "pass the masks of one model")
    either = sum(int((one[key] | other[key]).sum()) for key in one)
    return sum(int((one[key] & other[key]).sum()) for key in one) / either if either else 1.0


def spent(events: Sequence[Event], numel: int, steps: int) -> float:
    """What training cost at the sites, modelled, in dense steps: ``sum_t nnz_t / numel``, so r steps at density d count r d.

    Args:
        events: a sparsifier's ledger, see `Sparsifier`; before the first choice of masks everything is dense.
        numel: weights of all sites together.
        steps: optimizer steps of the whole training.

    >>> spent([Event("mask", 10, {"nnz": {"a": 1, "b": 1}})], numel=8, steps=30)
    15.0
    """
    kept, since, total = float(numel), 0, 0.0
    for event in events:
        nnz: Any = event.data.get("nnz")
        if nnz is not None:
            total += kept * (event.step - since)
            kept, since = float(sum(nnz.values())), event.step
    return (total + kept * (steps - since)) / numel
