"""An unpacked folder: what was packed, and how dense it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rarefy.probes.html import Section, megabytes, number, paragraph, table
from rarefy.probes.pages.layers import Column, along, by_block, sizes, spread
from rarefy.probes.pages.page import Facts, Page


def page(record: Mapping[str, Any], facts: Facts) -> Page:
    sites, gates = record["sites"], record["dropped_gates"]
    headline = f"{number(len(sites), 'matrix', 'matrices')} made dense again: {megabytes(record['bytes_stored'])} became {megabytes(record['bytes_dense'])}; {megabytes(facts.bytes)} on disk with everything else."
    left_out = f"Left out: {number(len(gates), 'activation gate', 'activation gates')} that the packed folder had. The model computes something else." if gates else ""
    sections = [
        Section("Density, matrix by matrix", along(sites, (("density", "a", "share of the weights that are not zero"),), "density")),
        Section("How densities are spread", spread(sites, (("density", "density"),), "density")),
        Section("Size of the weights that are not zero", sizes(facts.sizes)),
        Section("Every matrix", by_block("Densities and bytes", COLUMNS, sites)),
        Section("Gates left out", table("Where the packed folder zeroed activations.", ("place", "gate"), [(g["name"], g["gate"]) for g in gates])),
    ]
    return Page(f"{record['model']}, unpacked", [paragraph(headline), paragraph(left_out, "warn")], sections, "Bytes and densities are measured.")


COLUMNS = (
    Column("was stored as", lambda s: s["layout"], lambda found: ", ".join(dict.fromkeys(s["layout"] for s in found))),
    Column("shape", lambda s: " × ".join(map(str, s["shape"])), lambda found: f"{sum(math.prod(s['shape']) for s in found):,} weights"),
    Column(
        "density",
        lambda s: f"{s['density']:.4f}",
        lambda found: f"{sum(s['density'] * math.prod(s['shape']) for s in found) / max(sum(math.prod(s['shape']) for s in found), 1):.4f}",
    ),
    Column("stored", lambda s: megabytes(s["bytes"]), lambda found: megabytes(sum(s["bytes"] for s in found))),
    Column("dense", lambda s: megabytes(s["bytes_dense"]), lambda found: megabytes(sum(s["bytes_dense"] for s in found))),
)
