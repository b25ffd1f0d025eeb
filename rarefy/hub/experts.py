"""Our dispatch as an experts implementation of transformers 5."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import BadInput, MissingExtra
from rarefy.core.records import Routing, Rows
from rarefy.experts.dispatch import dispatch
from rarefy.experts.grouped import grouped_linear
from rarefy.experts.split import Expert, Split, slices

IMPLEMENTATION = "rarefy"


class _Host:
    """A transformers experts module, read as a bank; owns no parameters."""

    def __init__(self, module: Any) -> None:
        self.module, self.experts = module, int(module.num_experts)
        self.first = "gate_up_proj" if module.has_gate else "up_proj"

    def _middle(self, h: Tensor) -> Tensor:
        out: Tensor = self.module._apply_gate(h) if self.module.has_gate else self.module.act_fn(h)
        return out

    def _last(self, y: Tensor) -> Tensor:
        return self.module.post_expert_norm(y) if getattr(self.module, "has_post_expert_norm", False) else y

    def _pair(self, name: str) -> tuple[Tensor, Tensor | None]:
        weight = getattr(self.module, name)
        return weight.transpose(1, 2) if self.module.is_transposed else weight, getattr(self.module, f"{name}_bias") if self.module.has_bias else None

    def split(self) -> Split:
        first, second = self._slices(self.first), self._slices("down_proj")

        def expert(e: int) -> Expert:
            up, down = first(e), second(e)
            return lambda x: self._last(nn.functional.linear(self._middle(nn.functional.linear(x, *up)), *down))

        return Split(self.experts, expert)

    def _slices(self, name: str) -> Callable[[int], tuple[Tensor, Tensor | None]]:
        weight, bias = self._pair(name)
        weights, biases = slices(weight), None if bias is None else slices(bias)
        return lambda e: (weights[e], None if biases is None else biases[e])

    def each(self, x: Tensor, expert: Tensor) -> Tensor:
        h = self._middle(self._rowwise(x, expert, self.first))
        return self._last(self._rowwise(h, expert, "down_proj"))

    def grouped(self, rows: Rows) -> Tensor:
        (up, up_bias), (down, down_bias) = self._pair(self.first), self._pair("down_proj")
        h = self._middle(grouped_linear(rows.x, up, rows.offsets, item=rows.item, bias=up_bias))
        return self._last(grouped_linear(h, down, rows.offsets, bias=down_bias))

    def _rowwise(self, x: Tensor, expert: Tensor, name: str) -> Tensor:
        weight, bias = self._pair(name)
        y = torch.einsum("nh,noh->no", x, weight[expert])
        return y if bias is None else y + bias[expert]


def is_experts(module: nn.Module) -> bool:
    """Whether transformers can dispatch the module's experts by another implementation."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts call: hidden [T, H], index and weights [T, k] (index >= num_experts: nobody) -> [T, H]."""
    tokens, k = top_k_index.shape
    expert = top_k_index.reshape(-1).clamp(max=self.num_experts)
    return dispatch(hidden_states, Routing(expert, top_k_weights.reshape(-1), tokens, self.num_experts, k), _Host(self))


def use_experts(model: nn.Module) -> nn.Module:
    """Make the model's experts run through our dispatch; its configs are copied first, so no other model changes.

    Returns the same model. Raises MissingExtra without transformers, BadInput when it has no experts of transformers' kind.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as absent:
        raise MissingExtra("transformers", "hub") from absent
    if not any(is_experts(m) for m in model.modules()):
        raise BadInput(type(model).__name__, "it has no experts module that transformers can dispatch", "pass a mixture-of-experts model such as Mixtral")
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    memo: dict[int, Any] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is not None and hasattr(config, "_experts_implementation"):
            copied = copy.deepcopy(config, memo)
            copied._experts_implementation = IMPLEMENTATION
            module.config = copied
    return model
