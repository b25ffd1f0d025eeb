"""How a choice is stored: a matrix with zeros as one-dimensional bytes, and back."""

from __future__ import annotations

from types import ModuleType

from rarefy.layouts import bitmask, flat

LAYOUTS: dict[str, ModuleType] = {bitmask.NAME: bitmask, flat.NAME: flat}
