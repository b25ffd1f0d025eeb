"""What learns on a sparse matrix while the matrix itself is frozen, one idea per file.

Shapes: O output rows, I input columns, r rank, N rows of x.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Generator, Tensor

from rarefy.core.roles import Role, View

__all__ = ["Adaptation", "added"]


class Adaptation(Role):
    """Make the view of one sparse matrix [O, I]: the identity at the start, zero wherever the frozen matrix is, for any learned values.

    `lr` is the learning rate that it is trained with unless the user names one. A view is asked for with the matrix and
    a generator; a statistic (`gradient`, the mean dense gradient [O, I] of the loss) is asked for by naming it keyword-only.
    Learned tensors are float32 whatever the matrix's dtype.
    """

    lr: float

    @abstractmethod
    def view(self, weight: Tensor, *, generator: Generator, **stats: Tensor) -> View: ...


def added(weight: Tensor, change: Tensor) -> Tensor:
    """``W + D`` on the kept weights, exact zeros elsewhere; [O, I] in the dtype of W.

    The pattern is that of the frozen W, so that a kept weight which passes through zero in training stays kept.

    >>> added(torch.tensor([0.0, 2.0]), torch.tensor([1.0, -2.0])).tolist()
    [0.0, 0.0]
    """
    return torch.where(weight != 0, weight + change, 0.0).to(weight.dtype)
