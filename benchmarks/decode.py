"""Whole models: sparse ones against our own dense ones at the same bits, then everything against llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.models import make
from rarefy.hub.load import load
from rarefy.hub.text import heldout_ids
from rarefy.probes.decoding import race
from rarefy.probes.racers import racer

SCORED, PROMPT = 4096, 8

# {what is shown: the racers, the first of which is the peer}
RACES: dict[str, list[str]] = {
    "float32": ["demo@native", "{half-bitmask}@native"],
    "int4": ["{int4}@native", "{int4-gated}@native"],
    "others": [
        "demo@llama.cpp",
        "{Q4_0}@llama.cpp",
        "{Q8_0}@llama.cpp",
        "{Q4_K_M}@llama.cpp",
        "{int4}@native",
        "{int4-gated}@native",
        "demo@native",
        "{half-bitmask}@native",
        "demo@transformers",
        "demo@compiled",
        "demo@torch-int4",
        "demo@torch-int4-compiled",
    ],
}


def run(folder: Path, progress: Any) -> list[dict[str, Any]]:
    paths, tokenizer = make(folder), load("demo").tokenizer
    ids = heldout_ids(tokenizer, SCORED)
    rows = []
    for name, specs in RACES.items():
        racers = [racer(spec.format(**paths)) for spec in specs]
        for row in race(racers, ids[None, :PROMPT], ids, bos=tokenizer.bos_token_id, progress=progress):
            rows.append({"race": name, **row})
        del racers
        torch.compiler.reset()
    return rows
