"""SparseMixer: one expert per row, sampled in training, and a gradient for the router that counts what sampling another would have changed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, finfo

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Bank, Choice
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.banks.glu import GLU
from rarefy.experts.banks.scaled import Scaled
from rarefy.experts.routing import per_row, probabilities, row_major


def midpoint(p: Tensor, whole: Tensor) -> Tensor:
    """The weight of a sampled expert: forward p where `whole`, else p / 2; backward twice what comes from above, either way.

    The gradient of ``sum_D p_D L(p_D E_D)`` has a part through the weight, L' at p, and one through the sampling, L(p) - L(0), which is p
    times L' at p/2 by the midpoint rule. Half of the rows at each of the two places and doubled add up to both: on losses that are
    quadratic in the output exactly, on average over the samples. L(0) is the same for every expert and adds nothing.
    Source: Liu et al., SparseMixer, arXiv 2310.00811, and its code microsoft/SparseMixer.

    >>> p = torch.tensor([0.5, 0.5], requires_grad=True)
    >>> w = midpoint(p, torch.tensor([True, False]))
    >>> w.sum().backward(); w.tolist(), p.grad.tolist()
    ([0.5, 0.25], [2.0, 2.0])
    """
    held = p.detach()
    return held * (0.5 + 0.5 * whole) + 2 * (p - held)


def near_best(logits: Tensor, live: Tensor | None, epsilon: float) -> Tensor:
    """Logits [R, E] with those that jitter of this size would never bring to the top at the least float: ``(z* - z) / max(|z|, z*) > 2 epsilon``.

    >>> near_best(torch.tensor([[1.0, 0.9, 0.7]]), None, 0.1).tolist()[0][:2], bool(near_best(torch.tensor([[1.0, 0.7]]), None, 0.1)[0, 1] < -1e30)
    ([1.0, 0.8999999761581421], True)
    """
    least = finfo(logits.dtype).min
    z = logits if live is None else logits.masked_fill(~live, least)
    seen = z.detach()
    top = seen.max(-1, keepdim=True).values if z.shape[1] else seen
    return z.masked_fill((top - seen) / torch.maximum(seen.abs(), top) > 2 * epsilon, least)


def scaled(experts: int, width: int, inner: int) -> Bank:
    """Gated experts whose outputs one learned vector scales."""
    return Scaled(GLU(experts, width, inner), width)


@dataclass(frozen=True)
class SparseMixer(Choice):
    """Sample one expert in training, ``D ~ p``, and take the likeliest outside it; ``y = w_D omega * E_D(x)``, p a softmax over the near best.

    Scores with logits [R, E] -> Routing with k = 1. Experts far below a row's best (`epsilon`, see `near_best`) are out of its reach. The
    weight is `midpoint(p_D, whole)`: whole for the row's likeliest expert, so that training and evaluation agree there, and for the others
    by a fair coin. omega is the bank's (`Scaled`). The routing's scores carry the logits in reach: the balance loss is of p and of the sampled load.
    Source: Liu et al., SparseMixer, arXiv 2310.00811, and its code microsoft/SparseMixer (epsilon 0.1).

    Raises:
        BadInput: a negative epsilon.

    >>> r = SparseMixer()(Scores(torch.tensor([[1.0, 0.0], [1.0, 1.0]])), Context())
    >>> r.expert.tolist(), r.weight.tolist()
    ([0, 0], [1.0, 0.5])
    """

    name = "sparse-mixer"
    paper = Paper(
        "sparsemixer",
        "Sparse Backpropagation for MoE Training",
        "arXiv 2310.00811",
        (
            "the router has no bias, where the authors' example has one",
            "equations were read in the authors' code; their translation and ELECTRA models were not trained",
        ),
    )
    bank = staticmethod(scaled)
    balances = (LoadBalance(0.01),)
    epsilon: float = 0.1

    def __post_init__(self) -> None:
        if self.epsilon < 0:
            raise BadInput(f"epsilon {self.epsilon}", "jitter is not negative", "pass for example 0.1")

    def __call__(self, scores: Scores, context: Context) -> Routing:
        z = near_best(scores.logits.float(), context.live, self.epsilon)
        p, best = probabilities(z, context.live), z.detach().max(-1, keepdim=True).indices
        seen = replace(scores, logits=z)
        if not context.training:
            return row_major(seen, context, best, p.gather(1, best))
        sampled = (z.detach() - torch.empty_like(z).exponential_().log()).max(-1, keepdim=True).indices
        chosen = p.gather(1, sampled)
        whole = (sampled == best) | (torch.rand_like(chosen) > 0.5)
        return row_major(seen, context, sampled, midpoint(chosen, whole))

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return {"at most one expert per row": bool((per_row(routing) <= 1).all())}
