"""A pruned folder: headline, what was tried, density and error of every matrix, what was run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from rarefy.probes.figures.plane import Axis, Point, plane
from rarefy.probes.html import Section, megabytes, paragraph, percent, table
from rarefy.probes.pages.layers import Column, Site, along, by_block, mean, sizes, spread
from rarefy.probes.pages.page import Facts, Page

SETTINGS = ("recipe", "pattern", "allocation", "density_requested", "mode", "seed", "calibration", "threads", "versions")


def page(record: Mapping[str, Any], facts: Facts) -> Page:
    sites = record["sites"]
    alone = bool(sites) and all(s.get("error_on") == "weight" for s in sites)
    what = f"relative error of the {'weights' if alone else 'output'}"
    errors = (("error_mask_only", "b", "mask only"), ("error", "a", "with the solver's update"))
    sections = [
        *_search(record.get("optimize")),
        Section("Density kept, matrix by matrix", along(sites, (("density", "a", "share of the weights kept"),), "density")),
        Section(f"{what.capitalize()}, matrix by matrix", along(sites, errors, "error")),
        Section("How densities are spread", spread(sites, (("density", "density"),), "density")),
        Section("How errors are spread", spread(sites, [(key, words) for key, _, words in errors], what)),
        Section("Size of the weights kept", sizes(facts.sizes)),
        Section("Every matrix", by_block("Weights kept and errors", _columns(what), sites)),
        Section("What was run", table("Settings of this run.", ("setting", "value"), [(k, json.dumps(record[k])) for k in SETTINGS if k in record], words=True)),
    ]
    lead = [paragraph(_headline(record, facts.bytes)), paragraph(_emptied(record.get("emptied", [])), "warn")]
    foot = "Errors and densities are measured. The weights are dense with zeros: this page makes no claim about speed."
    return Page(f"{record['model']}: {record['recipe']} at density {record['density']:.4g}", lead, sections, foot)


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


def _search(found: Mapping[str, Any] | None) -> list[Section]:
    if not found:
        return []
    points = [
        Point(str(i), f"{t['recipe']}, {t['allocation']}, density {t['density']:.4g}", t["density"], t["loss"], t["interval"], t["ok"], _is(t, found["chosen"]))
        for i, t in enumerate(found["tried"], 1)
    ]
    rows = [
        (f"{p.label}. {t['recipe']}, {t['allocation']}", f"{t['density']:.4g}", percent(t["loss"]), " to ".join(map(percent, t["interval"])), "yes" if t["ok"] else "no")
        for p, t in zip(points, found["tried"], strict=True)
    ]
    drawn = plane(points, found["max_loss"], Axis("density", more=False))
    head = ("try", "density", "loss", "95% interval", "within budget")
    return [Section("What was tried", drawn + table("Every try: relative rise in held-out perplexity over the dense model.", head, rows))]


def _is(tried: Mapping[str, Any], chosen: Mapping[str, Any] | None) -> bool:
    return chosen is not None and all(tried[key] == chosen[key] for key in ("recipe", "density", "allocation"))


def _weights(site: Site) -> int:
    return math.prod(site["shape"])


def _columns(what: str) -> list[Column]:
    return [
        Column("shape", lambda s: " × ".join(map(str, s["shape"])), lambda found: f"{sum(map(_weights, found)):,} weights"),
        Column("kept", lambda s: f"{s['kept']:,}", lambda found: f"{sum(s['kept'] for s in found):,}"),
        Column("density", lambda s: f"{s['density']:.4f}", lambda found: f"{sum(s['kept'] for s in found) / max(sum(map(_weights, found)), 1):.4f}"),
        Column(f"{what}, mask only", lambda s: f"{s['error_mask_only']:.4f}", lambda found: mean([s["error_mask_only"] for s in found])),
        Column(what, lambda s: f"{s['error']:.4f}", lambda found: mean([s["error"] for s in found])),
    ]
