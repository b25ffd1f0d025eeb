"""Even: every place has the same density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rarefy.core.roles import Sharing


@dataclass(frozen=True)
class Even(Sharing):
    """The asked density at every place.

    >>> Even().densities(nn.Identity(), {"a": 4, "b": 2}, 0.5, ())
    {'a': 0.5, 'b': 0.5}
    """

    name: ClassVar[str] = "even"

    def densities(self, model: nn.Module, sizes: Mapping[str, int], density: float, batches: Sequence[Any]) -> dict[str, float]:
        return dict.fromkeys(sizes, density)
