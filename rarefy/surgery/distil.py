"""Learn from a model that is already right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.core.errors import BadInput


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """How far the student's next-token distribution is from the teacher's.

    ``T^2 / N sum_n KL(softmax(t_n / T) || softmax(s_n / T))``; logits [N, V] in, nats out; T^2 keeps the size of the
    gradient independent of T (Hinton et al., arXiv 1503.02531, section 2).

    Raises BadInput where the two have other vocabularies.

    >>> round(float(divergence(torch.zeros(1, 2), torch.tensor([[1.0, 1.0]]), 2.0)), 6)
    0.0
    """
    if student.shape != teacher.shape:
        raise BadInput(f"teacher logits {list(teacher.shape)}", f"the student's are {list(student.shape)}", "a teacher shares the student's vocabulary; take its dense parent")
    s, t = (F.log_softmax(x.float() / temperature, -1) for x in (student, teacher))
    return temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class Teacher:
    """A frozen model to learn from: ``(1 - alpha) * next-token loss + alpha * divergence``.

    Raises:
        BadInput: alpha outside [0, 1], or a temperature that is not positive.
    """

    model: Any
    alpha: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0 or not self.temperature > 0.0:
            raise BadInput(
                f"alpha {self.alpha}, temperature {self.temperature}", "alpha lies in [0, 1] and a temperature is positive", "pass for example --alpha 0.5 --temperature 2"
            )


def next_token_loss(model: nn.Module, ids: Tensor, teacher: Teacher | None = None) -> Tensor:
    """The loss of one window, int64 [1, T]: mean cross entropy of the T - 1 next tokens, nats, mixed with the teacher's opinion."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    task = F.cross_entropy(logits.float(), ids[0, 1:])
    if teacher is None:
        return task
    with torch.no_grad():
        wanted = teacher.model(input_ids=ids, use_cache=False).logits[0, :-1]
    return (1.0 - teacher.alpha) * task + teacher.alpha * divergence(logits, wanted, teacher.temperature)
