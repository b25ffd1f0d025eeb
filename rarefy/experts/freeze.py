"""Routers that no longer learn, as in fine-tuning."""

from __future__ import annotations

from torch import nn

from rarefy.core.errors import BadInput
from rarefy.core.roles import Affinity


def freeze_routers(model: nn.Module) -> list[str]:
    """Stop the gradient of every parameter of every affinity in the model; their names.

    Source: Chi et al., arXiv 2204.09179, section 3.3: in fine-tuning all parameters of the routing are frozen.

    Raises:
        BadInput: the model has no affinity.
    """
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Affinity)}
    if not routers:
        raise BadInput(f"freeze_routers of {type(model).__name__}", "the model needs a router of ours")
    frozen = []
    for name, router in routers.items():
        for key, parameter in router.named_parameters():
            parameter.requires_grad_(False)
            frozen.append(f"{name}.{key}".lstrip("."))
    return frozen
