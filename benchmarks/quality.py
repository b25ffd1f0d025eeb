"""What leaving weights or activations out costs SmolLM2-135M, without healing: perplexity by `rarefy eval`'s protocol, with intervals."""

from __future__ import annotations

import dataclasses
from typing import Any

from rarefy.activations.apply import apply_gating
from rarefy.cli import names
from rarefy.core.attach import detach_gates
from rarefy.core.search import trial
from rarefy.hub.load import load
from rarefy.hub.text import calibration_batches, heldout_ids
from rarefy.probes.perplexity import perplexity
from rarefy.weights.patterns import parse_pattern
from rarefy.weights.prune import prune

CALIBRATION, SCORED = 8192, 4096

# (recipe, pattern or None for the recipe's own, density)
PRUNED = (("sparsegpt", None, 0.5), ("sparsegpt", "2:4", 0.5), ("sparsegpt", "row-block:1x32", 0.7292), ("sparsegpt", "row-block:1x32", 0.5))
GATED = (("uniform-threshold", 0.8), ("uniform-threshold", 0.65), ("uniform-threshold", 0.5), ("cats", 0.7), ("cats", 0.5))


def run(progress: Any) -> list[dict[str, Any]]:
    loaded = load("demo")
    batches, ids = calibration_batches(loaded.tokenizer, CALIBRATION), heldout_ids(loaded.tokenizer, SCORED)

    def row(what: str, pattern: str | None, density: float) -> dict[str, Any]:
        scored = perplexity(loaded.model, ids, tokens=SCORED, bos=loaded.tokenizer.bos_token_id)
        return {"what": what, "pattern": pattern, "density": density, "perplexity": scored["perplexity"], "interval": scored["interval"], "scored": SCORED}

    rows = [row("dense", None, 1.0)]
    for name, pattern, density in PRUNED:
        progress(len(rows), 1 + len(PRUNED) + len(GATED), f"{name} {pattern or ''}")
        recipe = names.recipe(name)
        recipe = recipe if pattern is None else dataclasses.replace(recipe, pattern=parse_pattern(pattern))
        with trial(loaded.model):
            record = prune(loaded.model, batches, recipe, density=density, errors=False)
            rows.append(row(name, record["pattern"], record["density"]))
    for name, density in GATED:
        progress(len(rows), 1 + len(PRUNED) + len(GATED), name)
        found = apply_gating(loaded.model, dataclasses.replace(names.gating(name), density=density), batches[:-4], batches[-4:])
        rows.append(row(name, None, found["density"]))
        detach_gates(loaded.model)
    return rows
