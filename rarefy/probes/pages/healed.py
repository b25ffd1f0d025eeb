"""A healed folder: held-out perplexity before and after, the training loss, what was run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rarefy.probes.figures.lines import curve, ranges
from rarefy.probes.html import Section, megabytes, paragraph, table
from rarefy.probes.pages.layers import sizes
from rarefy.probes.pages.page import Facts, Page

SETTINGS = ("method", "options", "course", "teacher", "text", "pruned", "threads", "versions")


def page(record: Mapping[str, Any], facts: Facts) -> Page:
    scored = [(when, record[f"perplexity_{when}"]) for when in ("before", "after")]
    drawn = ranges([(when, s["value"], s["interval"], css) for (when, s), css in zip(scored, "ba", strict=True)], "perplexity, lower is better")
    head = ("when", "perplexity", "95% interval", "loss a token")
    sections = [
        Section("Held-out perplexity", drawn + table("Before and after, on the same held-out tokens.", head, [_cells(when, s, record[f"loss_{when}"]) for when, s in scored])),
        Section("Training loss, step by step", curve(record["train_loss"], "loss", "steps")),
        Section("Size of the weights that are not zero", sizes(facts.sizes)),
        Section("What was run", table("Settings of this run.", ("setting", "value"), [(k, json.dumps(record[k])) for k in SETTINGS if k in record], words=True)),
    ]
    foot = "Perplexities and counts are measured. The weights are dense with zeros: this page makes no claim about speed."
    return Page(f"{record['model']}, healed by {record['method']}", [paragraph(_headline(record, facts.bytes))], sections, foot)


def _headline(record: Mapping[str, Any], size: int) -> str:
    before, after, zeros = record["perplexity_before"]["value"], record["perplexity_after"]["value"], record["zeros"]
    return (
        f"Perplexity went from {before:.3f} to {after:.3f} ({after / before - 1:+.2%}) in {record['steps']:,} steps over {record['tokens']:,} tokens; "
        f"{zeros['lost']:,} of {zeros['before']:,} zeros in {record['matrices']} matrices were lost; {megabytes(size)} on disk, dense with zeros."
    )


def _cells(when: str, scored: Mapping[str, Any], loss: Mapping[str, Any]) -> tuple[str, ...]:
    interval = scored["interval"]
    return (when, f"{scored['value']:.4f}", "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}", f"{loss['value']:.5f}")
