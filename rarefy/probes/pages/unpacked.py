"""An unpacked folder: what was packed, and how dense it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rarefy.probes.html import chart, document, megabytes, number, paragraph, table


def page(record: Mapping[str, Any], size: int) -> str:
    """The page of one record; `size` is the bytes of the weights on disk."""
    sites, gates = record["sites"], record["dropped_gates"]
    headline = f"{number(len(sites), 'matrix', 'matrices')} made dense again: {megabytes(record['bytes_stored'])} became {megabytes(record['bytes_dense'])}; {megabytes(size)} on disk with everything else."
    rows = [(s["name"], s["layout"], " × ".join(map(str, s["shape"])), f"{s['density']:.4f}", megabytes(s["bytes"]), megabytes(s["bytes_dense"])) for s in sites]
    parts = [
        paragraph(headline),
        paragraph(f"Left out: {number(len(gates), 'activation gate', 'activation gates')} that the packed folder had. The model computes something else." if gates else "", "warn"),
        chart("Density, matrix by matrix", sites, (("density", "a", "weights that are not zero"),)),
        table("Every matrix", ("matrix", "was stored as", "shape", "density", "stored", "dense"), rows),
        table("Gates left out", ("place", "gate"), [(g["name"], g["gate"]) for g in gates]),
        paragraph("Bytes and densities are measured.", "soft"),
    ]
    return document(f"{record['model']}, unpacked", parts)
