"""A pruned folder: headline, density and error of every matrix, what was tried, what was run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rarefy.probes.html import chart, document, megabytes, paragraph, table

SETTINGS = ("recipe", "pattern", "allocation", "density_requested", "mode", "seed", "calibration", "threads", "versions")


def page(record: Mapping[str, Any], size: int) -> str:
    """The page of one record; `size` is the bytes of the weights on disk."""
    sites = record["sites"]
    alone = bool(sites) and all(s.get("error_on") == "weight" for s in sites)
    parts = [
        paragraph(_headline(record, size)),
        paragraph(_emptied(record.get("emptied", [])), "warn"),
        _tries(record.get("optimize")),
        chart("Density kept, matrix by matrix", sites, (("density", "a", "density"),)),
        chart(
            f"Relative error of the {'weights' if alone else 'output'}, matrix by matrix",
            sites,
            (("error_mask_only", "b", "mask only"), ("error", "a", "with the solver's update")),
        ),
        table("Every matrix", ("matrix", "shape", "kept", "density", "error, mask only", "error"), [_cells(s) for s in sites]),
        table("What was run", ("setting", "value"), [(k, json.dumps(record[k])) for k in SETTINGS if k in record]),
        paragraph("Errors and densities are measured. The weights are dense with zeros: this page makes no claim about speed.", "soft"),
    ]
    return document(f"{record['model']}: {record['recipe']} at density {record['density']:.4g}", parts)


def _headline(record: Mapping[str, Any], size: int) -> str:
    kept = sum(s["kept"] for s in record["sites"])
    if not record["sites"]:
        return "The dense model was kept: no density in reach stays within the budget of loss."
    loss = record.get("optimize")
    words = f"{kept:,} weights kept in {len(record['sites'])} matrices ({record['density']:.2%}); {megabytes(size)} on disk, dense with zeros."
    if loss:
        words += f" Held-out perplexity rose by {loss['loss']:.2%} (95%: {loss['interval'][0]:.2%} to {loss['interval'][1]:.2%}); the budget was {loss['max_loss']:.1%}."
    return words


def _emptied(names: list[str]) -> str:
    return f"No weight is kept in {', '.join(names)}: {'it computes' if len(names) == 1 else 'they compute'} zeros." if names else ""


def _tries(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    rows = [
        (f"{t['recipe']}, {t['allocation']}", f"{t['density']:.4g}", f"{t['loss']:.2%}", f"{t['interval'][0]:.2%} to {t['interval'][1]:.2%}", "yes" if t["ok"] else "no")
        for t in found["tried"]
    ]
    return table("What was tried", ("recipe", "density", "loss", "95% interval", "within budget"), rows)


def _cells(site: Mapping[str, Any]) -> tuple[str, ...]:
    shape = " × ".join(map(str, site["shape"]))
    return (site["name"], shape, f"{site['kept']:,}", f"{site['density']:.4f}", f"{site['error_mask_only']:.4f}", f"{site['error']:.4f}")
