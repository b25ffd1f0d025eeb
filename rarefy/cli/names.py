"""Text to parts: `wanda`, `outlier-share:spread=0.1`, `5%`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rarefy.core.discover import gatings, part, pick, recipes
from rarefy.core.errors import BadInput
from rarefy.core.records import Gating, Recipe
from rarefy.core.roles import Allocation, Criterion
from rarefy.weights.patterns import parse_pattern
from rarefy.weights.solvers.keep import Keep

__all__ = ["listed", "part", "recipe", "share"]


def recipe(name: str, *, criterion: str | None = None, allocation: str | None = None, pattern: str | None = None) -> Recipe:
    """The recipe of that name, with the parts that the user replaces.

    >>> recipe("wanda", pattern="2:4").pattern
    NM(n=2, m=4)
    """
    found: Recipe = pick(recipes(), name, "recipe")
    changes: dict[str, Any] = {}
    if criterion is not None:
        changes["solver"] = Keep(part(Criterion, criterion))
    if allocation is not None:
        changes["allocation"] = part(Allocation, allocation)
    if pattern is not None:
        changes["pattern"] = parse_pattern(pattern)
    return dataclasses.replace(found, **changes) if changes else found


def gating(text: str) -> Gating:
    """The gating of that name, with another density after a colon.

    >>> gating("teal:density=0.4").density
    0.4
    """
    name, _, options = text.partition(":")
    found: Gating = pick(gatings(), name, "gating")
    field, _, value = options.partition("=")
    if options and field != "density":
        raise BadInput(f"gating {text!r}", "a gating has the field density", f"pass for example {name}:density=0.5")
    density = share(value) if options else found.density
    if not 0 < density <= 1:
        raise BadInput(f"density {value}", "a density lies above 0 and is at most 1", f"pass for example {name}:density=0.5")
    return dataclasses.replace(found, density=density)


def share(text: str) -> float:
    """A fraction: `5%` or `0.05`.

    >>> share("5%")
    0.05
    """
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise BadInput(f"{text!r}", "a share is a number such as 0.05 or 5%") from error
    if not 0 <= value < math.inf:
        raise BadInput(f"{text!r}", "a share is a finite number, and not negative", "pass for example 5%")
    return value


def listed(text: str) -> list[str]:
    found = [item.strip() for item in text.split(",") if item.strip()]
    if not found:
        raise BadInput(f"{text!r}", "a list names at least one thing", "separate several by commas")
    return found
