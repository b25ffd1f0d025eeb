"""The mean dense gradient of every named tensor, with one tensor's gradient alive at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rarefy.core.errors import BadInput


def mean_gradients(parameters: Mapping[str, nn.Parameter], batches: Sequence[Tensor], loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """``1/B sum_b dL_b/dW`` for each parameter, float32 on the CPU, in one pass.

    A gradient is added to its sum and freed as soon as backward has made it, so that the device never holds two. The
    parameters' `grad` and `requires_grad` are as before afterwards.

    Raises:
        BadInput: no batches, or a gradient that is not finite (named).

    >>> w = nn.Parameter(torch.tensor([2.0]))
    >>> mean_gradients({"w": w}, [torch.tensor(1.0), torch.tensor(3.0)], lambda x: (w * x).sum()), w.grad
    ({'w': tensor([2.])}, None)
    """
    if not batches:
        raise BadInput("no batches", "a mean gradient needs at least one", "pass training text")
    sums = {key: torch.zeros(p.shape, dtype=torch.float32) for key, p in parameters.items()}
    before = {key: (p.requires_grad, p.grad) for key, p in parameters.items()}
    hooks = []
    try:
        for key, p in parameters.items():
            p.grad = None
            hooks.append(p.requires_grad_(True).register_post_accumulate_grad_hook(_absorb(key, sums[key])))
        for batch in batches:
            with torch.enable_grad():
                loss(batch).backward()
    finally:
        for hook in hooks:
            hook.remove()
        for key, p in parameters.items():
            flag, grad = before[key]
            p.requires_grad_(flag)
            p.grad = grad
    return {key: total / len(batches) for key, total in sums.items()}


def _absorb(key: str, total: Tensor) -> Callable[[Tensor], None]:
    def hook(p: Tensor) -> None:
        assert p.grad is not None
        if not bool(torch.isfinite(p.grad).all()):
            raise BadInput(f"the gradient of {key}", "gradients must be finite", "check the training text, or load the model in float32")
        total.add_(p.grad.float().cpu())
        p.grad = None

    return hook
