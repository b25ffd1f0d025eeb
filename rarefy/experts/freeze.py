"""Routers and experts that no longer learn, as in fine-tuning."""

from __future__ import annotations

from torch import nn

from rarefy.core.errors import BadInput
from rarefy.core.roles import Affinity, Bank


def freeze_experts(model: nn.Module) -> list[str]:
    """Stop the gradient of every parameter of every affinity and every bank in the model; their names.

    What is around the routed layers still learns, and routing changes with it alone: a small task neither overfits the experts nor
    moves the router. Source: Chi et al., arXiv 2204.09179, section 3.3, "routing frozen": both router and experts are.

    Raises:
        BadInput: the model has neither.
    """
    routed = {name: module for name, module in model.named_modules() if isinstance(module, (Affinity, Bank))}
    if not routed:
        raise BadInput(f"freeze_experts of {type(model).__name__}", "the model needs a router or experts of ours")
    frozen = []
    for name, module in routed.items():
        for key, parameter in module.named_parameters():
            parameter.requires_grad_(False)
            frozen.append(f"{name}.{key}".lstrip("."))
    return frozen
