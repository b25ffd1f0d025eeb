"""A packed folder: bytes before and after, the layout of every matrix, the gates and what they spare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rarefy.probes.html import Section, megabytes, number, paragraph, table
from rarefy.probes.pages.layers import Column, Site, along, by_block, mean, sizes, spread
from rarefy.probes.pages.page import Facts, Page


def page(record: Mapping[str, Any], facts: Facts) -> Page:
    gating = record.get("gating") or {}
    inputs = {m["name"]: m for m in gating["ledger"]["matrices"]} if gating else {}
    sites = [{**s, "dense_kb": s["bytes_dense"] / 1e3, "stored_kb": s["bytes"] / 1e3, "ledger": inputs.get(s["name"].removesuffix(".weight"))} for s in record["sites"]]
    lossy = any(s["error"] for s in sites)
    kept = any(s["dense_because"] for s in sites)
    gated = [{**s, "inputs": s["ledger"]["density"]} for s in sites if s["ledger"]]
    edits = [(", ".join(e["rows"]), str(e["from"]), str(e["to"])) for e in record["edits"]]
    sections = [
        Section("Bytes, matrix by matrix", along(sites, (("dense_kb", "b", "dense"), ("stored_kb", "a", "stored")), "kB", " kB")),
        Section("Density, matrix by matrix", along(sites, (("density", "a", "share of the weights that are not zero"),), "density")),
        Section("Inputs that stay, matrix by matrix", along(gated, (("inputs", "a", "share of the inputs that are not zero after the gates"),), "density")),
        Section("Relative error of the stored weights, matrix by matrix", along(sites, (("error", "b", "rounding of the layout"),), "error") if lossy else ""),
        Section("How densities are spread", spread(sites, (("density", "density of the weights"),), "density")),
        Section("How errors are spread", spread(sites, (("error", "rounding"),), "relative error of the stored weights") if lossy else ""),
        Section("Size of the weights stored", sizes(facts.sizes)),
        Section("Every matrix", by_block("Layouts, bytes and errors", [*_columns(), *(GATED if inputs else ()), *(BECAUSE if kept else ())], sites)),
        Section("Gates", table("Where activations are zeroed.", ("place", "gate", "density asked", "density, held-out"), _gates(record["gates"], gating))),
        Section("Narrower MLPs", table("Hidden units that were cut out.", ("matrices", "units before", "units after"), edits)),
    ]
    lead = [paragraph(_headline(record, facts.bytes)), paragraph(_spared(gating))]
    foot = "Bytes, densities and errors are measured. `rarefy bench` and `rarefy generate` measure speed; this page makes no claim about it."
    return Page(f"{number(record['packed'], 'matrix', 'matrices')} packed: {record['layout']}", lead, sections, foot)


def _headline(record: Mapping[str, Any], size: int) -> str:
    before, after = record["bytes_dense"], record["bytes_stored"]
    return (
        f"{record['packed']} of {len(record['sites'])} matrices are packed: {megabytes(before)} became {megabytes(after)} "
        f"({after / max(before, 1):.1%}); {megabytes(size)} on disk with everything else. Layouts: {_layouts(record['sites'])}."
    )


def _spared(gating: Mapping[str, Any]) -> str:
    if not gating:
        return ""
    ledger, asked = gating["ledger"], gating["density_requested"]
    return (
        f"Gated by {gating['gating']}: {gating['density']:.2%} of the gated activations stay{'' if asked is None else f', {asked:.2%} asked'}, and a token takes "
        f"{ledger['mac_density']:.2%} of the matrices' multiply-adds, measured on {ledger['tokens']:,} held-out tokens."
    )


def _gates(gates: list[Mapping[str, Any]], gating: Mapping[str, Any]) -> list[tuple[str, ...]]:
    measured = {g["name"]: g for g in gating.get("gates", [])}
    return [(g["name"], g["gate"], *(_share(measured.get(g["name"], {}).get(key)) for key in ("density_set", "density"))) for g in gates]


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _layouts(sites: Sequence[Site]) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(s["layout"] or "dense" for s in sites).most_common())


def _density(sites: Sequence[Site]) -> str:
    """Of all weights together; a matrix counts by its dense bytes."""
    size = sum(s["bytes_dense"] for s in sites)
    return f"{sum(s['density'] * s['bytes_dense'] for s in sites) / size:.4f}" if size else "-"


def _executed(sites: Sequence[Site]) -> str:
    rows = [s["ledger"] for s in sites if s["ledger"]]
    dense = sum(row["macs"] for row in rows)
    return f"{sum(row['macs_executed'] for row in rows) / dense:.4f}" if dense else "-"


def _columns() -> list[Column]:
    return [
        Column("layout", lambda s: s["layout"] or "dense", _layouts),
        Column("density", lambda s: f"{s['density']:.4f}", _density),
        Column("dense", lambda s: megabytes(s["bytes_dense"]), lambda found: megabytes(sum(s["bytes_dense"] for s in found))),
        Column("stored", lambda s: megabytes(s["bytes"]), lambda found: megabytes(sum(s["bytes"] for s in found))),
        Column("error", lambda s: f"{s['error']:.4f}", lambda found: mean([s["error"] for s in found])),
    ]


GATED = (
    Column("inputs that stay", lambda s: f"{s['ledger']['density']:.4f}" if s["ledger"] else "-", lambda found: mean([s["ledger"]["density"] for s in found if s["ledger"]])),
    Column("multiply-adds that stay", lambda s: _executed([s]), _executed),
)
BECAUSE = (Column("stays dense because", lambda s: s["dense_because"] or "", lambda found: f"{sum(s['layout'] is None for s in found)} dense"),)
