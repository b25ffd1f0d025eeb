"""A course: what a training back minimises, and over how much of the model at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from rarefy.core.roles import Role
from rarefy.surgery.adapters import Adaptation
from rarefy.surgery.distil import Teacher
from rarefy.surgery.heal import Training, Watch, heal
from rarefy.weights.checkpoint import Checkpoint


class Course(Role):
    """Train what a method attaches to the pruned matrices of a causal language model and fold it in, in place; resumable to the same bytes, no zero lost.

    The report holds what `rarefy.surgery.heal.heal` returns, and what else the course knows. `unit` is what a checkpoint counts.
    """

    unit: ClassVar[str] = "steps"

    @abstractmethod
    def run(
        self,
        model: nn.Module,
        windows: Sequence[Tensor],
        method: Adaptation,
        *,
        teacher: Teacher | None = None,
        training: Training | None = None,
        checkpoint: Checkpoint | None = None,
        progress: Watch | None = None,
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class EndToEnd(Course):
    """The next-token loss of the whole model, mixed with a teacher's opinion where there is one; each window is seen once. See `rarefy.surgery.heal.heal`."""

    name = "end-to-end"

    def run(
        self,
        model: nn.Module,
        windows: Sequence[Tensor],
        method: Adaptation,
        *,
        teacher: Teacher | None = None,
        training: Training | None = None,
        checkpoint: Checkpoint | None = None,
        progress: Watch | None = None,
    ) -> dict[str, Any]:
        return heal(model, windows, method, teacher=teacher, training=training, checkpoint=checkpoint, progress=progress)
