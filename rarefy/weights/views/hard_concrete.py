"""Hard concrete: a random gate on each weight, exactly zero with a learned probability."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rarefy.core.records import Paper, Pruned
from rarefy.core.roles import View

_LOW, _HIGH = -0.1, 1.1  # the stretch
_TEMPERATURE = 2 / 3


class HardConcrete(View):
    """Multiply each weight by a stretched, clipped concrete variable.

    ``u ~ U(0, 1), s = sigmoid((log u - log(1 - u) + a) / (2/3)), z = clip(1.2 s - 0.1, 0, 1), w_eff = w z``

    In eval mode and in `export` the gate is ``z = clip(1.2 sigmoid(a) - 0.1, 0, 1)``. `a` is learned and has the weight's
    shape; the noise is drawn from torch's own generator.

    Args:
        like: the weight, for its shape and device.
        start: sigmoid(a) at the start.

    Source: Louizos et al., Learning Sparse Neural Networks through L0 Regularization, arXiv 1712.01312, eqs. 10 to 13.
    The paper gates groups of weights in its experiments; here each weight has a gate.

    >>> view = HardConcrete(torch.ones(2, 3), start=0.95).eval()
    >>> view(torch.ones(2, 3)).detach().unique().tolist(), round(float(view.expected_nnz().detach()) / 6, 3)
    ([1.0], 0.989)
    """

    paper = Paper("l0-hard-concrete", "Learning Sparse Neural Networks through L0 Regularization", "arXiv 1712.01312", ("a gate for each weight",))

    @classmethod
    def examples(cls) -> tuple[HardConcrete, ...]:
        """Settled: in training the gates are drawn, so two forwards differ."""
        gates = cls(torch.zeros(6, 8))
        with torch.no_grad():
            gates.a.copy_(torch.linspace(-4, 4, 48).view(6, 8))
        return (gates.eval(),)

    def __init__(self, like: Tensor, start: float = 0.95) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full_like(like.detach(), math.log(start / (1 - start))))

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return weight * self._settled().to(weight.dtype)
        u = torch.rand_like(self.a).clamp(1e-6, 1 - 1e-6)
        s = torch.sigmoid((torch.logit(u) + self.a) / _TEMPERATURE)
        return weight * (s * (_HIGH - _LOW) + _LOW).clamp(0, 1).to(weight.dtype)

    def _settled(self) -> Tensor:
        return (torch.sigmoid(self.a) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def expected_nnz(self) -> Tensor:
        """``sum P(z != 0) = sum sigmoid(a - 2/3 log(0.1 / 1.1))``, a scalar with its gradient."""
        return torch.sigmoid(self.a - _TEMPERATURE * math.log(-_LOW / _HIGH)).sum()

    def export(self, weight: Tensor) -> Pruned:
        value = (weight * self._settled().to(weight.dtype)).detach()
        return Pruned(value, value != 0)
