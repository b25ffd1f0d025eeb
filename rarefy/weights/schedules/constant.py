"""Constant: the same value throughout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rarefy.core.records import Progress
from rarefy.core.roles import Schedule


@dataclass(frozen=True)
class Constant(Schedule):
    """``v(t) = v``, of any type.

    >>> Constant(0.5)(Progress(step=7))
    0.5
    """

    value: Any
    name = "constant"

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(0.5),)

    def __call__(self, progress: Progress) -> Any:
        return self.value
