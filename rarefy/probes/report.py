"""One self-contained page about a folder that a verb wrote: pruned, healed, packed, unpacked, or searched for a target."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rarefy.core.errors import BadFile, BadInput, RarefyError
from rarefy.core.files import write_atomic
from rarefy.probes.magnitudes import Magnitudes, magnitudes, matrices
from rarefy.probes.pages import healed, optimized, packed, pruned, unpacked
from rarefy.probes.pages.page import Facts, Page

Draw = Callable[[Mapping[str, Any], Facts], Page]
PAGES: dict[str, tuple[str, Draw]] = {  # {file of a record: (the verb that writes it, its page)}
    "optimize.json": ("optimize", optimized.page),
    "pack.json": ("pack", packed.page),
    "unpack.json": ("unpack", unpacked.page),
    "heal.json": ("heal", healed.page),
    "prune.json": ("prune", pruned.page),
}
BELOW = {"optimize.json": "pack.json"}  # what a page goes on with, where it is there


def report(folder: str | Path) -> str:
    """The page for a folder that `prune`, `optimize`, `heal`, `pack` or `unpack` wrote, as HTML.

    Raises:
        BadInput: no record of theirs there. BadFile: it is not what rarefy wrote, or its weights are damaged.
    """
    where = Path(folder)
    found = [name for name in PAGES if (where / name).is_file()]
    if not found:
        what = "has no " + ", ".join([*PAGES][:-1]) + f" or {[*PAGES][-1]}" if where.is_dir() else "is no folder here"
        raise BadInput(f"{folder} {what}", "a report is about a folder that prune, optimize, heal, pack or unpack wrote", "name such a folder")
    page = _page(where, found[0])
    below = BELOW.get(found[0])
    if below is not None and below in found:
        rest = _page(where, below)
        page = dataclasses.replace(page, sections=[*page.sections, *rest.sections], lead=[*page.lead, *rest.lead])
    return page.html()


def write_report(folder: str | Path) -> Path:
    """Write report.html into the folder, whole or not at all."""
    out = Path(folder) / "report.html"
    write_atomic(out, report(folder).encode())
    return out


def _page(folder: Path, name: str) -> Page:
    verb, draw = PAGES[name]
    try:
        record = json.loads((folder / name).read_text())
        return draw(record, Facts(_bytes(folder), _sizes(folder, record)))
    except RarefyError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, StopIteration) as error:
        raise BadFile(str(folder / name), f"it is not a record of {verb} ({type(error).__name__}: {error})", f"run rarefy {verb} again") from error


def _sizes(folder: Path, record: Mapping[str, Any]) -> Sequence[Magnitudes]:
    if "forms" in record:
        return ()  # the page of what is packed there has them
    return magnitudes(folder, [site["name"] for site in record["sites"]] if "sites" in record else matrices(folder))


def _bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors") if f.name != "masks.safetensors")
