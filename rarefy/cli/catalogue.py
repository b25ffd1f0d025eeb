"""`rarefy catalogue`, `rarefy methods` and `rarefy cache`."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from rarefy import catalogue as papers
from rarefy.cli import methods_page
from rarefy.cli.arguments import Json
from rarefy.cli.main import app
from rarefy.cli.output import line, megabytes, show, table
from rarefy.core.discover import methods as discovered
from rarefy.core.discover import recipes, train_recipes
from rarefy.core.errors import BadInput
from rarefy.hub.cache import cache_dir, clear_cache, list_cache

STATES = ("working", "partial", "missing")


@app.command(epilog="Examples:  rarefy catalogue   ·   rarefy catalogue --status working   ·   rarefy catalogue --check")
def catalogue(
    status: Annotated[str | None, typer.Option(help="Only rows that are working, partial or missing.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Fail where the committed catalogue or docs/methods.md is not fresh.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write the committed catalogue and docs/methods.md anew.")] = False,
    as_json: Json = False,
) -> None:
    """The 172 papers, which of them work here, and by what evidence."""
    if status not in (None, *STATES):
        raise BadInput(f"status {status!r}", f"a row is {', '.join(STATES)}", "pass for example --status working")
    if check:
        papers.check()
        methods_page.check()
    if write:
        papers.write()
        methods_page.write()
    rows = [r for r in papers.generate() if status in (None, r["status"])]
    show(rows, as_json, _draw)


def _draw(rows: list[dict[str, Any]]) -> None:
    table([{**r, "level": r["evidence"]["level"]} for r in rows], ["id", "slug", "field", "status", "level"])
    line(", ".join(f"{count} {status}" for status, count in sorted(Counter(r["status"] for r in rows).items())))


@app.command(epilog="Examples:  rarefy methods   ·   rarefy --plugin mine.py methods --json")
def methods(as_json: Json = False) -> None:
    """Every part and recipe by name: what the other verbs accept."""
    rows = [{"role": role.__name__.lower(), "name": name, "what": (kind.__doc__ or "").split("\n")[0]} for role in methods_page.ROLES for name, kind in discovered(role).items()]
    rows += [{"role": "recipe", "name": name, "what": f"{type(r.solver).__name__}, {type(r.allocation).__name__}, {type(r.pattern).__name__}"} for name, r in recipes().items()]
    rows += [{"role": "training recipe", "name": name, "what": r.paper.title if r.paper else ""} for name, r in train_recipes().items()]
    show(rows, as_json, lambda found: table(found, ["role", "name", "what"]))


@app.command(epilog="Examples:  rarefy cache   ·   rarefy cache --clear")
def cache(clear: Annotated[bool, typer.Option("--clear", help="Remove every entry.")] = False, as_json: Json = False) -> None:
    """Converted models that are kept between runs."""
    freed = clear_cache() if clear else 0
    rows = [{"name": c.name, "bytes": c.bytes} for c in list_cache()]
    record = {"folder": str(cache_dir()), "entries": rows, "freed_bytes": freed}
    show(record, as_json, _draw_cache)


def _draw_cache(record: dict[str, Any]) -> None:
    table(record["entries"], ["name", "bytes"], record["folder"])
    if record["freed_bytes"]:
        line(f"freed {megabytes(record['freed_bytes'])}")
