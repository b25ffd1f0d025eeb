"""Activation L1: what a layer is given becomes sparse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Progress
from rarefy.core.roles import View
from rarefy.weights.penalties import ActivationPenalty


@dataclass(frozen=True)
class ActivationL1(ActivationPenalty):
    """L1 of the inputs of a module by name, or of the leaf modules whose name matches a glob.

    ``strength * sum over modules of mean over tokens of |x|_1``

    `loss` takes inputs [..., C], one a call; a token is a row of C, and those that the mask [...] leaves out do not
    count. The input of a GLU's down projection is its product, `*.down_proj`; that of an MLP's second layer its hidden
    activations.

    Raises:
        BadInput: a token mask of another shape than the leading axes.

    Source: Song et al., ProSparse, arXiv 2402.13516, the regularised product x_1 of step 2. The paper does not say
    whether the norm is a sum or a mean over tokens; ours is a mean, and the strength does not follow its sine stages.

    >>> part = ActivationL1("2", strength=0.5)
    >>> float(part.loss({"2": [torch.tensor([[1., -3.], [0., 2.]])]}, Progress(), torch.tensor([True, False])))
    2.0
    """

    modules: str = "*"
    strength: float = 1e-4
    name = "activation-l1"

    def off(self) -> ActivationL1:
        return replace(self, strength=0.0)

    def wants(self, name: str, module: Any) -> bool:
        leaf = all(isinstance(child, View) for child in module.children())
        return name == self.modules or (leaf and not isinstance(module, View) and fnmatchcase(name, self.modules))

    def loss(self, inputs: Mapping[str, Sequence[Tensor]], progress: Progress, token_mask: Tensor | None = None) -> Tensor:
        return self.strength * torch.stack([self._mean(calls, token_mask) for calls in inputs.values()]).sum()

    def _mean(self, calls: Sequence[Tensor], token_mask: Tensor | None) -> Tensor:
        norms = [x.abs().sum(-1) for x in calls]
        if token_mask is None:
            return torch.cat([n.flatten() for n in norms]).mean()
        if any(n.shape != token_mask.shape for n in norms):
            raise BadInput(f"token mask of shape {tuple(token_mask.shape)}", f"the tapped inputs have tokens of shape {tuple(norms[0].shape)}", "give one value for each token")
        return torch.stack([(n * token_mask).sum() / token_mask.sum().clamp(min=1) for n in norms]).mean()
