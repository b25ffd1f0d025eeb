"""Scores of a group from the mean of its tokens."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from rarefy.core.records import Context, Scores
from rarefy.core.roles import Affinity


def pooled(x: Tensor, valid: Tensor | None) -> Tensor:
    """The mean over the tokens of each group that are not padding (`valid` [G, M] False): x [G, M, d] -> [G, d]; 0 without any.

    >>> import torch
    >>> pooled(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]])).tolist()
    [[2.0]]
    """
    if valid is None:
        return x.sum(1) / max(1, x.shape[1])
    return x.masked_fill(~valid[..., None], 0.0).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)


class Pooled(nn.Module):
    """Let an affinity score each group's mean: x [G, M, d] -> Scores of logits [G, E]. The mean sees every token, later ones too."""

    def __init__(self, inner: Affinity) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, context: Context) -> Scores:
        scores: Scores = self.inner(pooled(x.float(), context.valid), replace(context, valid=None), None)
        return scores
