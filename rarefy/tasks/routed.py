"""The model of a task that is about one routed part: any of its role, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from rarefy.core.discover import part
from rarefy.core.errors import BadInput
from rarefy.core.roles import Task

OPTIONS = ("width", "experts", "inner", "router")


def routed(task: Task, role: type[Any], make: Callable[[int, int, int, Any], nn.Module], seed: int, options: Mapping[str, Any]) -> nn.Module:
    """``make(width, experts, inner, part)`` from the seed alone; sizes and the part's name are options, or else fields of the task (`inner` None: width).

    Raises:
        BadInput: no such part (the sentence lists what there is), one that refuses its hyper-parameters, or another option.
    """
    other = sorted(set(options) - set(OPTIONS))
    if other:
        raise BadInput(f"option {', '.join(other)} of the task {task.name}", f"its model has the options {', '.join(OPTIONS)}", "leave it out")
    width, experts, inner, router = (options.get(name, getattr(task, name)) for name in OPTIONS)
    chosen = part(role, router)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(int(width), int(experts), int(width if inner is None else inner), chosen)
