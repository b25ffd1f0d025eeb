"""A soft choice of rows by experts in which no row serves too many: an entropy-regularised linear program."""

from __future__ import annotations

import torch
from torch import Tensor


def capped(scores: Tensor, take: Tensor, limit: int, *, temperature: float = 1e-3, sweeps: int = 100) -> Tensor:
    """log A of ``max_A <S, A> + temperature H(A)``, every expert taking `take` rows of each group, a row at most `limit` experts, 0 <= A <= 1.

    scores S [G, M, E] in [0, 1], of G groups of M rows, take [G] -> log A [G, M, E], as A itself has many entries that no float holds.
    Alternating projections in the Kullback-Leibler distance (Dykstra's), as updates of the two constraints' prices; the last is that of
    the rows' limit, which holds to rounding, while `take` holds nearly. A score of -inf stays out.
    Source: Zhou et al., arXiv 2202.09368, section 3.3, temperature 1e-3. We cool from 1 down to it over the first half of the
    sweeps: at 1e-3 alone a price moves by a thousandth per sweep, and a hundred sweeps do not get far.

    >>> A = capped(torch.tensor([[[0.9, 0.8], [0.1, 0.3]]]), torch.tensor([1]), 1).exp()
    >>> A.round(decimals=3).tolist()
    [[[1.0, 0.0], [0.0, 1.0]]]
    """
    s = scores.float()
    if s.shape[1] == 0:
        return s
    by_row, by_expert = torch.zeros_like(s[:, :, :1]), torch.zeros_like(s)
    bound = torch.tensor(float(limit), device=s.device).log()
    for sweep in range(sweeps):
        t = max(temperature, temperature ** (2 * sweep / sweeps))
        by_expert = t * _fill((s + by_row) / t, take)
        by_row = t * (bound - ((s + by_expert) / t).logsumexp(2, keepdim=True)).clamp(max=0.0)
    return (s + by_expert + by_row) / temperature


def _fill(log_a: Tensor, take: Tensor) -> Tensor:
    """What to add to each entry so that A <= 1 and every expert's column adds up to `take`: one figure per column, less where 1 is reached."""
    x = log_a.sort(dim=1, descending=True).values
    rest = x.flip(1).logcumsumexp(1).flip(1)  # of the m-th largest and all after it
    full = torch.arange(x.shape[1], device=x.device)[:, None]  # how many entries are 1
    price = (take[:, None, None] - full).clamp(min=0).log() - rest
    fits = (x + price <= 0) | (full >= take[:, None, None] - 1)
    price = price.gather(1, fits.int().argmax(1, keepdim=True)).nan_to_num(neginf=0.0, posinf=0.0)
    return torch.minimum(price, -log_a)
