"""`rarefy report`."""

from __future__ import annotations

from typing import Annotated

import typer

from rarefy.cli.arguments import Json
from rarefy.cli.main import app
from rarefy.cli.output import line, show
from rarefy.probes.report import write_report


@app.command(epilog="Examples:  rarefy report half   ·   rarefy report half-packed   ·   rarefy report fast   ·   rarefy report half-healed --json")
def report(folder: Annotated[str, typer.Argument(help="A folder that prune, optimize, heal, pack or unpack wrote.")], as_json: Json = False) -> None:
    """One self-contained page about a pruned, healed, packed or unpacked folder, or one that a search wrote, as report.html inside it."""
    record = {"report": str(write_report(folder))}
    show(record, as_json, lambda r: line(r["report"]))
