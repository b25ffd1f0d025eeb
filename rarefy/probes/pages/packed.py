"""A packed folder: bytes before and after, the layout of every matrix, the gates and what they spare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rarefy.probes.html import chart, document, megabytes, number, paragraph, table


def page(record: Mapping[str, Any], size: int) -> str:
    """The page of one record; `size` is the bytes of the weights on disk."""
    sites = record["sites"]
    rows = [{"name": s["name"], "density": s["density"], "dense": s["bytes_dense"] / 1e3, "stored": s["bytes"] / 1e3, "error": s["error"]} for s in sites]
    lossy = any(s["error"] for s in sites)
    gating = record.get("gating") or {}
    parts = [
        paragraph(_headline(record, size)),
        paragraph(_spared(gating)),
        chart("Bytes, matrix by matrix", rows, (("dense", "b", "dense"), ("stored", "a", "stored")), " kB"),
        chart("Density, matrix by matrix", rows, (("density", "a", "weights that are not zero"),)),
        chart("Relative error of the stored weights, matrix by matrix", rows, (("error", "b", "rounding of the layout"),)) if lossy else "",
        table("Gates", ("place", "gate", "density asked", "density, held-out"), _gates(record["gates"], gating)),
        table("Narrower MLPs", ("matrices", "units before", "units after"), [(", ".join(e["rows"]), str(e["from"]), str(e["to"])) for e in record["edits"]]),
        table("Every matrix", ("matrix", "layout", "density", "dense", "stored", "error", "stays dense because"), [_cells(s) for s in sites]),
        paragraph("Bytes, densities and errors are measured. `rarefy bench` and `rarefy generate` measure speed; this page makes no claim about it.", "soft"),
    ]
    return document(f"{number(record['packed'], 'matrix', 'matrices')} packed: {record['layout']}", parts)


def _headline(record: Mapping[str, Any], size: int) -> str:
    before, after = record["bytes_dense"], record["bytes_stored"]
    layouts = Counter(s["layout"] or "dense" for s in record["sites"])
    return (
        f"{record['packed']} of {len(record['sites'])} matrices are packed: {megabytes(before)} became {megabytes(after)} "
        f"({after / max(before, 1):.1%}); {megabytes(size)} on disk with everything else. "
        f"Layouts: {', '.join(f'{name} {count}' for name, count in layouts.most_common())}."
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


def _cells(site: Mapping[str, Any]) -> tuple[str, ...]:
    stored = (megabytes(site["bytes_dense"]), megabytes(site["bytes"]), f"{site['error']:.4f}")
    return (site["name"], site["layout"] or "dense", f"{site['density']:.4f}", *stored, site["dense_because"] or "")
