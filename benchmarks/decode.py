"""Whole models: sparse ones against our own dense ones at the same bits, then everything against llama.cpp."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import make
from rarefy.hub.load import load
from rarefy.hub.text import heldout_ids
from rarefy.probes.decoding import race
from rarefy.probes.racers import racers

PROMPT = 8


@dataclass(frozen=True)
class Race:
    """The racers, the first of which is the peer, and how many held-out tokens each one scores."""

    racers: tuple[str, ...]
    scored: int = 4096


RACES: dict[str, Race] = {
    "float32": Race(("demo@native", "{half-bitmask}@native", "{mild-bitmask}@native")),
    "int4": Race(("{int4}@native", "{int4-gated}@native")),
    "llama.cpp": Race(
        ("demo@llama.cpp", "{Q4_0}@llama.cpp", "{Q8_0}@llama.cpp", "{Q4_K_M}@llama.cpp", "{int4}@native", "{int4-gated}@native", "demo@native", "{half-bitmask}@native")
    ),
    "transformers": Race(("demo@transformers", "demo@torch-int4", "demo@native", "{int4}@native"), scored=768),
    "compiled": Race(("demo@compiled", "demo@torch-int4-compiled", "demo@native", "{int4}@native"), scored=256),  # compiling takes minutes
}


def run(name: str, folder: Path, progress: Any) -> list[dict[str, Any]]:
    paths, tokenizer, chosen = make(folder), load("demo").tokenizer, RACES[name]
    ids = heldout_ids(tokenizer, chosen.scored)
    running = racers([spec.format(**paths) for spec in chosen.racers], lambda words: print(words, file=sys.stderr))
    return [{"race": name, **row} for row in race(running, ids[None, :PROMPT], ids, bos=tokenizer.bos_token_id, progress=progress)]
