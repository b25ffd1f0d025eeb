"""One self-contained page about a folder that a verb wrote: pruned, healed, packed or unpacked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rarefy.core.errors import BadFile, BadInput
from rarefy.core.files import write_atomic
from rarefy.probes.pages import healed, packed, pruned, unpacked

page = pruned.page
Page = Callable[[Mapping[str, Any], int], str]
PAGES: dict[str, tuple[str, Page]] = {  # {file of a record: (the verb that writes it, its page)}
    "pack.json": ("pack", packed.page),
    "unpack.json": ("unpack", unpacked.page),
    "heal.json": ("heal", healed.page),
    "prune.json": ("prune", pruned.page),
}


def report(folder: str | Path) -> str:
    """The page for a folder that `prune`, `optimize`, `heal`, `pack` or `unpack` wrote, as HTML.

    Raises:
        BadInput: no record of theirs there. BadFile: it is not what rarefy wrote.
    """
    found = [name for name in PAGES if (Path(folder) / name).is_file()]
    if not found:
        what = "has no " + ", ".join([*PAGES][:-1]) + f" or {[*PAGES][-1]}" if Path(folder).is_dir() else "is no folder here"
        raise BadInput(f"{folder} {what}", "a report is about a folder that prune, optimize, heal, pack or unpack wrote", "name such a folder")
    verb, draw = PAGES[found[0]]
    try:
        record = json.loads((Path(folder) / found[0]).read_text())
        return draw(record, _bytes(Path(folder)))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise BadFile(str(Path(folder) / found[0]), f"it is not a record of {verb} ({type(error).__name__}: {error})", f"run rarefy {verb} again") from error


def write_report(folder: str | Path) -> Path:
    """Write report.html into the folder, whole or not at all."""
    out = Path(folder) / "report.html"
    write_atomic(out, report(folder).encode())
    return out


def _bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors") if f.name != "masks.safetensors")
