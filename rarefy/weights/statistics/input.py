"""What the inputs of a site look like: norms and second moments, streamed in float32 (moments) over rows [R, I]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.roles import Statistic


@dataclass(frozen=True)
class InputNorm(Statistic):
    """The l2 norm of every input column over all rows.

    ``n_j = sqrt(sum_r x_rj^2)``; `finish` gives float32 [C], C the columns of the site's matrix.

    >>> s = InputNorm(); state = s.start(torch.zeros(1, 2))
    >>> s.finish(s.update(state, torch.tensor([[3., 0.], [4., 1.]]))).tolist()
    [5.0, 1.0]
    """

    name = "input_norm"

    def start(self, weight: Tensor) -> dict[str, Tensor]:
        return {"square": torch.zeros(weight[0].numel(), dtype=torch.float64, device=weight.device)}

    def update(self, state: dict[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
        return {"square": state["square"] + seen.float().square().sum(0, dtype=torch.float64)}

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        return state["square"].sqrt().float()


@dataclass(frozen=True)
class Hessian(Statistic):
    """The second moment of the inputs: the Hessian of the layer-wise squared error, up to a factor.

    ``H = sum_r x_r x_r^T``; `finish` gives float32 [C, C].

    >>> s = Hessian(); state = s.start(torch.zeros(1, 2))
    >>> s.finish(s.update(state, torch.tensor([[1., 2.]]))).tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """

    name = "hessian"

    def start(self, weight: Tensor) -> dict[str, Tensor]:
        columns = weight[0].numel()
        return {"sum": torch.zeros(columns, columns, device=weight.device)}

    def update(self, state: dict[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
        rows = seen.float()
        return {"sum": state["sum"].addmm_(rows.t(), rows)}

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        return state["sum"]
