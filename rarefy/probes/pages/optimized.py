"""A folder that a search for a target wrote: every measured form between its loss and what it gains, and what was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rarefy.probes.figures.plane import Axis, Point, plane
from rarefy.probes.html import Section, megabytes, paragraph, percent, table
from rarefy.probes.pages.page import Facts, Page

SPEED = Axis("tokens a second")
BYTES = Axis("MB of weights on disk", per=1e-6, more=False)
HEAD = (
    "form",
    "tokens/s",
    "× its bits, nothing left out",
    "from slowest to fastest round",
    "× dense",
    "on disk",
    "in memory",
    "loss",
    "95% interval",
    "within budget",
    "density",
    "engine, precision",
)


def page(record: Mapping[str, Any], facts: Facts) -> Page:
    forms = record["forms"]
    chosen = next(row for row in forms if _is(row, record))
    rows = [_cells(i, row) for i, row in enumerate(forms, 1)]
    tries = [(t["form"], percent(t["loss"]), _between(t["interval"]), "yes" if t["ok"] else "no") for t in record["tried"]]
    sections = [
        Section("Loss against speed", plane(_points(record, "tokens_per_s"), record["max_loss"], SPEED)),
        Section("Loss against bytes", plane(_points(record, "file_bytes"), record["max_loss"], BYTES)),
        Section("Measured forms", table("Every form as it is stored and run; its number is that of the figures.", HEAD, rows)),
        Section("What was tried", table("Tries of the search, in order: relative rise in held-out perplexity.", ("form", "loss", "95% interval", "within budget"), tries)),
    ]
    lead = [paragraph(_headline(record, chosen)), paragraph(f"Warning: {record['warning']}." if record["warning"] else "", "warn")]
    foot = f"Losses, speeds, bytes and densities are measured, on {record['threads']} thread{'' if record['threads'] == 1 else 's'} of the machine that ran the search."
    return Page(f"{record['chosen']}: chosen of {len(forms)} forms", lead, sections, foot)


def _headline(record: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    return (
        f"{record['chosen']} writes {chosen['tokens_per_s']:.4g} tokens a second, {chosen['over_dense']:.3g} times as many as the dense model, and takes "
        f"{megabytes(chosen['file_bytes'])} on disk. Held-out perplexity rose by {percent(record['loss'])} (95%: {_between(record['interval'])}); the budget was {record['max_loss']:.1%}. "
        f"{sum(row['ok'] for row in record['forms'])} of {len(record['forms'])} measured forms are within it."
    )


def _between(interval: Sequence[float]) -> str:
    return " to ".join(map(percent, interval))


def _points(record: Mapping[str, Any], gain: str) -> list[Point]:
    return [Point(str(i), row["form"], row[gain], row["loss"], row["interval"], row["ok"], _is(row, record)) for i, row in enumerate(record["forms"], 1)]


def _is(row: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether a form is the chosen one; two that differ in their allocation alone are called the same."""
    return bool(row["form"] == record["chosen"] and row["loss"] == record["loss"] and row["interval"] == record["interval"])


def _cells(number: int, row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{number}. {row['form']}",
        f"{row['tokens_per_s']:.4g}",
        f"{row['over_base']:.3f}",
        f"{row['over_base_min']:.3f} to {row['over_base_max']:.3f}",
        f"{row['over_dense']:.3f}",
        megabytes(row["file_bytes"]),
        megabytes(row["model_bytes"]),
        percent(row["loss"]),
        _between(row["interval"]),
        "yes" if row["ok"] else "no",
        f"{row['density']:.4f}",
        f"{row['engine']}, {row['precision']}",
    )
