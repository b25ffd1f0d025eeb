"""Soft threshold: weights shrink towards zero by a learned amount."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.core.roles import View


class SoftThreshold(View):
    """Shrink by one learned threshold; gradients pass where the weight survives.

    ``w_eff = sign(w) * relu(|w| - sigmoid(s))``, s a learned scalar.

    Source: Kusupati et al., Soft Threshold Weight Reparameterization, arXiv 2002.03231, eq. 4.

    >>> view = SoftThreshold(0.0); view(torch.tensor([2., 0.25])).tolist()
    [1.5, 0.0]
    """

    def __init__(self, start: float = -5.0) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(float(start)))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.sign(weight) * torch.relu(weight.abs() - torch.sigmoid(self.s))
