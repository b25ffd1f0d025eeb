"""A routed layer on few rows and on many: ours against transformers' implementations of the same experts."""

from __future__ import annotations

from typing import Any

from rarefy.probes.experts_bench import Sizes, bench_experts

LAYERS = ("64:8:512:512", "64:8:512:128")  # wide experts are bound by memory, narrow ones by what surrounds them
TOKENS = (1, 16, 128, 2048)


def run(progress: Any) -> list[dict[str, Any]]:
    return bench_experts([Sizes.parse(text) for text in LAYERS], TOKENS, progress=progress)
