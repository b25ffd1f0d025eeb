"""Control: what steers routed layers from step to step of an optimizer, and its state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Entry
from rarefy.core.roles import Controller
from rarefy.core.trace import Trace


class Control:
    """Run controllers over a model's routed layers, after each step of the optimizer and in the loss, until closed.

    ``control.loss(task).backward()``, once per forward, adds what the controllers add. They are given what the layers routed in
    training; evaluation in between is not counted. Without controllers nothing is watched. `state_dict` is plain (it fits JSON); load
    it after the model's own. One process: counts are not all-reduced.

    Raises:
        BadInput: the model has no routed layer; a state of other controllers.
        Refused: a step without `loss` where a controller acts in it.

    >>> from rarefy.experts.banks.glu import GLU
    >>> from rarefy.experts.moe import MoE
    >>> from rarefy.experts.routers.cosine import ByAngle
    >>> moe = MoE(ByAngle.affinity(8, 4), ByAngle(), GLU(4, 8, 6))
    >>> optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    >>> control = Control(moe, optimizer, ByAngle.controllers)
    >>> control.loss(moe(torch.randn(5, 8)).sum()).backward()
    >>> optimizer.step()
    >>> moe.affinity.centres.norm(dim=1).detach().allclose(torch.tensor(1.5))
    True
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, controllers: Sequence[Controller]) -> None:
        self.controllers = tuple(controllers)
        self._trace, self._counted, self._asked = Trace(model, rows=any(c.needs_rows for c in controllers)), 0, False
        if self.controllers:
            self._trace.__enter__()
            self._hook = optimizer.register_step_post_hook(lambda stepped, *_: self._after(stepped))
        with torch.no_grad():
            self.states = [c.start(self._trace.layers) for c in self.controllers]

    def loss(self, task: Tensor) -> Tensor:
        """The task's loss and what every controller adds for the forward that it comes from."""
        entries, self._asked = self._trace.entries, True
        for controller, state in zip(self.controllers, self.states, strict=True):
            task = task + controller.loss(state, _in_training(entries[self._counted :]))
        self._counted = len(entries)
        return task

    @torch.no_grad()
    def _after(self, optimizer: Optimizer) -> None:
        if not self._asked and any(type(c).loss is not Controller.loss for c in self.controllers):
            raise Refused("a step without control.loss", "a controller acts in the loss, and would train without it", "call control.loss(task).backward()")
        entries = _in_training(self._trace.take())
        self._counted, self._asked = 0, False
        self.states = [c.after_step(state, self._trace.layers, entries, optimizer) for c, state in zip(self.controllers, self.states, strict=True)]

    def close(self) -> None:
        """Stop watching and acting."""
        if self._trace.layers:
            self._hook.remove()
            self._trace.__exit__(InterruptedError, None, None)

    def state_dict(self) -> dict[str, Any]:
        return {"controllers": [repr(c) for c in self.controllers], "states": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = [repr(c) for c in self.controllers]
        if state["controllers"] != names:
            raise BadInput(f"a control state of {state['controllers']}", f"this control has {names}", "build the same controllers first")
        self.states = [dict(each) for each in state["states"]]
        for controller, each in zip(self.controllers, self.states, strict=True):
            controller.resume(each, self._trace.layers)


def _in_training(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.context.training]
