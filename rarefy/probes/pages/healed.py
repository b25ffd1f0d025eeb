"""A healed folder: held-out perplexity before and after, the training loss, what was run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rarefy.probes.html import curve, document, megabytes, paragraph, ranges, table

SETTINGS = ("method", "options", "teacher", "text", "pruned", "threads", "versions")


def page(record: Mapping[str, Any], size: int) -> str:
    """The page of one record; `size` is the bytes of the weights on disk."""
    scored = [(when, record[f"perplexity_{when}"]) for when in ("before", "after")]
    parts = [
        paragraph(_headline(record, size)),
        ranges("Held-out perplexity", [(when, s["value"], s["interval"], css) for (when, s), css in zip(scored, "ba", strict=True)], "lower is better"),
        curve("Training loss, step by step", record["train_loss"], "loss"),
        table("Held-out", ("", "perplexity", "95% interval", "loss a token"), [_cells(when, s, record[f"loss_{when}"]) for when, s in scored]),
        table("What was run", ("setting", "value"), [(k, json.dumps(record[k])) for k in SETTINGS if k in record]),
        paragraph("Perplexities and counts are measured. The weights are dense with zeros: this page makes no claim about speed.", "soft"),
    ]
    return document(f"{record['model']}, healed by {record['method']}", parts)


def _headline(record: Mapping[str, Any], size: int) -> str:
    before, after, zeros = record["perplexity_before"]["value"], record["perplexity_after"]["value"], record["zeros"]
    return (
        f"Perplexity went from {before:.3f} to {after:.3f} ({after / before - 1:+.2%}) in {record['steps']:,} steps over {record['tokens']:,} tokens; "
        f"{zeros['lost']:,} of {zeros['before']:,} zeros in {record['matrices']} matrices were lost; {megabytes(size)} on disk, dense with zeros."
    )


def _cells(when: str, scored: Mapping[str, Any], loss: Mapping[str, Any]) -> tuple[str, ...]:
    interval = scored["interval"]
    return (when, f"{scored['value']:.4f}", "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}", f"{loss['value']:.5f}")
