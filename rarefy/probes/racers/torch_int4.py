"""A model's linear layers over the int4 kernel that ships inside torch: the peer that needs no further package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import BadInput
from rarefy.hub.packed import replace

GROUP = 32
OUTPUTS = 16  # the kernel wants multiples of it


class Int4Linear(nn.Module):
    """``y = x W^T + b`` by `torch.ops.aten._weight_int4pack_mm_for_cpu`; weights in asymmetric groups of 32: ``w = scale (code - 8) + zero``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        codes, self.figures = _quantised(linear.weight.detach().float())
        self.weight = nn.Parameter(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), requires_grad=False)
        self.figures = nn.Parameter(self.figures, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.reshape(-1, self.in_features), self.weight, GROUP, self.figures)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], self.out_features)


def _quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int32 [O, I], scale and zero float32 [I / 32, O, 2])."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    codes = torch.where(step > 0, (groups - low) / step, 0.0).round().clamp(0, 15)
    return codes.flatten(1).int(), torch.stack([step[..., 0], (low + 8 * step)[..., 0]], -1).transpose(0, 1).contiguous()


def use_torch_int4(model: Any) -> Any:
    """Replace every linear layer of the blocks, in place; the output head stays as it is.

    Raises:
        BadInput: a layer whose sides the kernel does not take.
    """
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is head:
            continue
        if module.in_features % GROUP or module.out_features % OUTPUTS:
            raise BadInput(f"{path}, {module.out_features} x {module.in_features}", f"torch's int4 kernel takes multiples of {OUTPUTS} x {GROUP}", "take another peer")
        replace(model, path, Int4Linear(module))
    return model
