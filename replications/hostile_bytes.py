"""100,000 hostile byte strings through every layout, with the kernels under the address and undefined-behaviour sanitizers.

Bytes of random matrices, as they are and spoilt (bits, heads, counts, lengths, shapes, types, noise), are checked; what is accepted is
unpacked, multiplied, read row by row and decoded with, on every instruction set, and compared with the reference. Of no paper: no row
of the catalogue.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDERS = ("rarefy/layouts", "rarefy/kernels")
CASES = 100_000

SLUG = None
NAME = f"{CASES} hostile byte strings are refused or compute what they say, under sanitizers"
SOURCES = (
    "rarefy/testing/hostile.py",
    "rarefy/runtime/decoder.py",
    *sorted(str(file.relative_to(ROOT)) for folder in FOLDERS for kind in ("*.py", "*.cpp", "*.hpp") for file in (ROOT / folder).rglob(kind)),
)


def run() -> tuple[dict[str, Any], bool]:
    """(what was accepted and refused in each layout and what went wrong, whether nothing did)."""
    made = subprocess.run(["make", "-s", "hostile", f"CASES={CASES}"], cwd=ROOT, capture_output=True, text=True)
    lines = made.stdout.strip().splitlines()
    found = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {"report": made.stderr[-2000:]}
    return found, made.returncode == 0
