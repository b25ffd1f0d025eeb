"""What is added to training so that weights or activations become sparse, one idea per file.

Five kinds, told apart by where they act in a step: on the loss, on the dense gradients, on the values after the
optimizer, by a dual variable, on the activations that were seen.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rarefy.core.records import Progress
from rarefy.core.roles import Penalty


class _Kind(Penalty):
    @abstractmethod
    def off(self) -> Any:
        """The same penalty at strength zero: training with it is bit-identical to training without."""


class LossPenalty(_Kind):
    """Added to the task's loss."""

    @abstractmethod
    def loss(self, weights: Mapping[str, Tensor], progress: Progress) -> Tensor: ...


class GradientPenalty(_Kind):
    """Edits the dense gradients before the optimizer's step, after a rewiring read them and before the support masks them.

    `edit` takes weights, their gradients and bool masks of the support by key, and returns the new gradients.
    """

    @abstractmethod
    def edit(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], support: Mapping[str, Tensor], progress: Progress) -> dict[str, Tensor]: ...


class ProximalPenalty(_Kind):
    """Applied to the values after the optimizer's step, with the learning rate of each tensor."""

    @abstractmethod
    def prox(self, weights: Mapping[str, Tensor], rates: Mapping[str, float], progress: Progress) -> dict[str, Tensor]: ...


class DualPenalty(_Kind):
    """A constraint with a dual variable: ascent on what was observed, then its product with the constraint in the loss.

    `start` gives the state; `ascend` returns the next one from detached observations; `loss` has the gradient. Both ask
    for observations keyword-only: `expected_nnz` {key: scalar} of the views that can tell, `weights` {key: tensor}, or
    what the user passes to `sp.loss(task, name=value)`. The sparsifier checkpoints the state.
    """

    @abstractmethod
    def start(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def ascend(self, state: Mapping[str, Tensor], progress: Progress, **seen: Any) -> dict[str, Tensor]: ...

    @abstractmethod
    def loss(self, state: Mapping[str, Tensor], progress: Progress, **seen: Any) -> Tensor: ...


class ActivationPenalty(_Kind):
    """Added to the loss from what the tapped modules were given since the last one.

    `wants` says whether a module's input is tapped; `loss` takes {module name: its inputs [..., C], one a call} and a
    bool token mask over the leading axes, False = padding.
    """

    @abstractmethod
    def wants(self, name: str, module: Any) -> bool: ...

    @abstractmethod
    def loss(self, inputs: Mapping[str, Sequence[Tensor]], progress: Progress, token_mask: Tensor | None = None) -> Tensor: ...
