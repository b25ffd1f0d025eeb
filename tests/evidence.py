"""`@check(slug, name, kind)` marks a test as evidence for a catalogue row; `--record-evidence` writes the verdicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest

F = TypeVar("F", bound=Callable[..., object])


def check(slug: str, name: str, kind: str) -> Callable[[F], F]:
    """kind: "contract" (level 1), "method" and "twin" (together level 2), "oracle" (level 3)."""
    if kind not in ("contract", "method", "twin", "oracle"):
        raise ValueError(f"evidence kind {kind!r}: one of contract, method, twin, oracle")
    return pytest.mark.evidence(slug=slug, name=name, kind=kind)
