"""Control: what acts on routed layers between two steps of an optimizer, and its state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from rarefy.core.errors import BadInput
from rarefy.core.roles import Controller
from rarefy.core.trace import Trace


class Control:
    """Run controllers over every routed layer of a model after each step of the optimizer, until closed.

    A controller is given what the layer routed in training since the last step; evaluation in between is not counted. Without
    controllers nothing is watched. `state_dict` is plain (it fits JSON); load it after the model's own. One process: counts are not all-reduced.

    Raises:
        BadInput: the model has no routed layer; a state of other layers or controllers.

    >>> from rarefy.core.records import Context
    >>> from rarefy.experts.banks.glu import GLU
    >>> from rarefy.experts.moe import MoE
    >>> from rarefy.experts.routers.cosine import ByAngle
    >>> moe = MoE(ByAngle.affinity(8, 4), ByAngle(), GLU(4, 8, 6))
    >>> optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    >>> control = Control(moe, optimizer, ByAngle.controllers)
    >>> moe(torch.randn(5, 8)).sum().backward()
    >>> optimizer.step()
    >>> moe.affinity.centres.norm(dim=1).detach().allclose(torch.tensor(1.5))
    True
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, controllers: Sequence[Controller]) -> None:
        self.controllers = tuple(controllers)
        self._trace = Trace(model)
        if self.controllers:
            self._trace.__enter__()
            self._hook = optimizer.register_step_post_hook(lambda *_: self._after())
        with torch.no_grad():
            self._states = [{path: c.start(layer) for path, layer in self._trace.layers.items()} for c in self.controllers]

    @torch.no_grad()
    def _after(self) -> None:
        entries = [entry for entry in self._trace.take() if entry.context.training]
        for controller, states in zip(self.controllers, self._states, strict=True):
            for path, layer in self._trace.layers.items():
                states[path] = controller.after_step(states[path], layer, [entry for entry in entries if entry.path == path])

    def close(self) -> None:
        """Stop watching and acting."""
        if self._trace.layers:
            self._hook.remove()
            self._trace.__exit__(InterruptedError, None, None)

    def state_dict(self) -> dict[str, Any]:
        return {"controllers": [repr(c) for c in self.controllers], "states": self._states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        shape = [repr(c) for c in self.controllers], [sorted(each) for each in self._states]
        given = state["controllers"], [sorted(each) for each in state["states"]]
        if given != shape:
            raise BadInput(f"a control state of {given}", f"this control has {shape}", "build the same model with the same controllers first")
        self._states = [dict(each) for each in state["states"]]
