"""Taps: the inputs of chosen modules, kept from a forward until the loss that asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rarefy.core.errors import BadInput
from rarefy.core.trace import replaying
from rarefy.weights.penalties import ActivationPenalty


class Taps:
    """Forward pre-hooks on the modules that the penalties want; a forward without gradients is not recorded.

    The recomputation of a checkpointed module is not recorded twice. Reentrant checkpointing runs its forward without
    gradients, so that nothing is recorded there and `take` refuses instead of dropping the penalty in silence.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._seen: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self._wanted: list[tuple[ActivationPenalty, list[str]]] = []

    def arm(self, penalties: Sequence[ActivationPenalty]) -> None:
        """Tap for these penalties and no others. BadInput where one wants no module of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen, self._wanted = [], {}, []
        modules = dict(self.model.named_modules())
        for penalty in penalties:
            names = [name for name, module in modules.items() if penalty.wants(name, module)]
            if not names:
                raise BadInput(f"{penalty!r}", "it wants the input of no module of the model", "take names from model.named_modules()")
            self._wanted.append((penalty, names))
        every = dict.fromkeys(name for _, names in self._wanted for name in names)
        self._handles = [modules[name].register_forward_pre_hook(self._hook(name)) for name in every]

    def _hook(self, name: str) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled() and not replaying() and args and isinstance(args[0], Tensor):
                self._seen.setdefault(name, []).append(args[0])

        return record

    def take(self) -> list[tuple[ActivationPenalty, dict[str, Sequence[Tensor]]]]:
        """Each penalty with what it wanted and was seen since the last call. BadInput where that is nothing."""
        seen, self._seen = self._seen, {}
        found: list[tuple[ActivationPenalty, dict[str, Sequence[Tensor]]]] = [(p, {name: seen[name] for name in names if name in seen}) for p, names in self._wanted]
        for penalty, inputs in found:
            if not inputs:
                raise BadInput(
                    f"activations for {penalty!r}",
                    "a tapped module must run, with gradients, before the loss",
                    "call sp.loss after the forward; under checkpointing pass use_reentrant=False",
                )
        return found
