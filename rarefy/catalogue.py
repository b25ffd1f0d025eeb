"""The catalogue: 172 published papers, which of them work here, and by what evidence. Generated, never typed.

A row's objects are found by discovery. Its evidence is what marked tests wrote (`pytest --record-evidence`), each
verdict with a hash of the sources it depends on; a verdict whose sources changed counts as "stale".
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

from rarefy.core.discover import papers
from rarefy.core.errors import RarefyError

DATA = Path(__file__).parent / "data"
EVIDENCE = DATA / "evidence.json"
CATALOGUE = DATA / "catalogue.json"


class Stale(RarefyError):
    """The committed catalogue is not what code and evidence give."""

    exit_code = 1


def generate() -> list[dict[str, Any]]:
    """The 172 rows: {id, slug, title, field, status, objects, composition, evidence: {level, checks}, deviations}.

    status is "working" at level 2 and above, "partial" where an object carries the slug, else "missing". Level 1: a
    contract test passes; level 2: besides, a check passes on the method and fails on its lazy twin; level 3: besides,
    an oracle agrees.
    """
    with (DATA / "papers.tsv").open() as file:
        return [_row(r) for r in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def baselines() -> list[dict[str, Any]]:
    """The methods here that are not among the 172: the same columns, the title and reference from the code."""
    listed = {r["slug"] for r in generate()}
    return [
        _entry(slug, {"id": None, "slug": slug, "title": objects[0].paper.title, "field": "baseline", "composition": ""})
        for slug, objects in papers().items()
        if slug not in listed
    ]


def _row(row: dict[str, str]) -> dict[str, Any]:
    return _entry(row["slug"], {k: row[k] for k in ("id", "slug", "title", "field")} | {"composition": f"{row['file']} with {row['borrows']}"})


def _entry(slug: str, head: dict[str, Any]) -> dict[str, Any]:
    objects = papers().get(slug, [])
    checks = _checks(slug)
    level = _level({(c["kind"]) for c in checks if c["verdict"] == "pass"}) if objects and all(c["verdict"] == "pass" for c in checks) else 0
    status = "missing" if not objects else "working" if level >= 2 else "partial"
    deviations = sorted({d for o in objects for d in o.paper.deviations})
    return {
        **{k: head[k] for k in ("id", "slug", "title", "field")},
        "status": status,
        "objects": sorted(_object_name(o) for o in objects),
        "composition": head["composition"],
        "evidence": {"level": level, "checks": checks},
        "deviations": deviations,
    }


def _level(kinds: set[str]) -> int:
    if not {"method", "twin"} <= kinds:
        return 1 if "contract" in kinds else 0
    return 3 if "oracle" in kinds else 2


def _object_name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}" if inspect.isclass(value) else f"{type(value).__name__} {value.name}"


@cache
def _evidence() -> dict[str, list[dict[str, Any]]]:
    return json.loads(EVIDENCE.read_text()) if EVIDENCE.is_file() else {}


def _checks(slug: str) -> list[dict[str, str]]:
    root = Path(__file__).parent.parent
    checkout = (root / "tests").is_dir()  # an installed package has no tests to hash
    found = []
    for check in _evidence().get(slug, []):
        sources = [root / s for s in check["sources"]]
        stale = checkout and (not all(s.is_file() for s in sources) or digest(sources) != check["digest"])
        found.append({"name": check["name"], "kind": check["kind"], "verdict": "stale" if stale else check["verdict"]})
    return found


def digest(sources: list[Path]) -> str:
    """SHA-256 over the contents of source files, in order of name."""
    total = hashlib.sha256()
    for source in sorted(sources):
        total.update(source.name.encode() + b"\0" + source.read_bytes())
    return total.hexdigest()


def sources_of(slug: str) -> list[Path]:
    """The files that hold the objects of a slug, and those of the parts that a recipe, a gating or a class names (a router its balance losses)."""
    files = set()
    for value in papers().get(slug, []):
        held = [each for each in vars(value).values() if not (inspect.isclass(value) and inspect.isfunction(each))]  # a class's methods are in its file
        parts = [*([value] if inspect.isclass(value) else []), *(kind for each in held for kind in _kinds(each))]
        files |= {Path(inspect.getfile(p)) for p in parts if "core/records" not in inspect.getfile(p)}
    return sorted(files)


def _kinds(held: Any) -> list[Any]:
    """The classes and functions of ours among a value's parts."""
    if isinstance(held, tuple):
        return [kind for each in held for kind in _kinds(each)]
    if isinstance(held, partial):
        held = held.func
    kind = held if inspect.isclass(held) or inspect.isfunction(held) else type(held)
    return [kind] if kind.__module__.startswith("rarefy") else []


def write() -> None:
    """Write the committed catalogue anew."""
    CATALOGUE.write_text(json.dumps(generate(), indent=1) + "\n")


def check() -> None:
    """Raises Stale where the committed catalogue differs from what code and evidence give."""
    committed = json.loads(CATALOGUE.read_text()) if CATALOGUE.is_file() else []
    fresh = generate()
    if committed != fresh:
        changed = [r["slug"] for r, c in zip(fresh, committed or [None] * len(fresh), strict=False) if r != c]
        raise Stale(f"the catalogue differs in {', '.join(changed[:8])}", "it is generated from code and evidence", "run make catalogue and commit the result")
