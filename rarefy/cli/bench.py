"""`rarefy bench`."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from rarefy.cli.arguments import Json
from rarefy.cli.main import app
from rarefy.cli.output import bars, err, show, table
from rarefy.core.errors import BadInput, Refused
from rarefy.probes.bench import MEMORY, PEERS, Subject
from rarefy.probes.bench import bench as run

COLUMNS = ("layout", "pattern", "shape", "density", "batch", "peer", "ratio", "ratio_spread", "us", "us_peer", "gb_per_s")


@app.command(epilog="Examples:  rarefy bench --layout bitmask,csr --density 0.5,0.1 --batch 1,64   ·   rarefy bench --layout block@block:4x1,n_m@2:4 --peer torch,own-dense --json")
def bench(
    op: Annotated[str, typer.Option(help="What is timed; linear is all there is.")] = "linear",
    layout: Annotated[str, typer.Option(help="Layouts, comma-separated; LAYOUT@PATTERN for weights that have a structure, e.g. n_m_g@2:4:16.")] = "bitmask,csr",
    shape: Annotated[str, typer.Option(help="Shapes OUTxIN, comma-separated.")] = "2048x8192",
    density: Annotated[str, typer.Option(help="Shares of weights that are kept, comma-separated.")] = "0.5",
    batch: Annotated[str, typer.Option(help="Rows of x, comma-separated.")] = "1",
    peer: Annotated[str, typer.Option(help=f"What to compare with, comma-separated: {', '.join(PEERS)}.")] = "torch,own-dense",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; their median is reported.", min=5)] = 7,
    memory: Annotated[int, typer.Option(help="Bytes for copies of the weights, which keep them out of cache.", min=1)] = MEMORY,
    max_load: Annotated[float | None, typer.Option(help="Refuse above this load a core; default: warn above 0.5.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and inputs.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Sparse products against dense ones on this machine, each checked before it is timed."""
    if op != "linear":
        raise BadInput(f"op {op!r}", "the only one is linear", "pass --op linear")
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if max_load is not None and load > max_load:
        raise Refused(f"a load of {load:.2f} a core", f"this run is to refuse above {max_load:g}", "wait until the machine is quiet")
    subjects = [Subject.parse(text) for text in layout.split(",")]
    shapes = [_shape(text) for text in shape.split(",")]
    with bars(quiet=as_json) as progress:
        record = run(subjects, shapes, _numbers(density, float), _numbers(batch, int), peer.split(","), rounds=rounds, seed=seed, memory=memory, progress=progress)
    for warning in sorted({row["warning"] for row in record["rows"] if row["warning"]}):
        err.print(f"warning: {warning}")
    show(record, as_json, _draw)
    if record["summary"]["wrong"]:
        raise typer.Exit(1)


def _draw(record: dict[str, Any]) -> None:
    rows = [{**row, "shape": f"{row['shape'][0]}x{row['shape'][1]}", "ratio_spread": _spread(row["ratio_spread"])} for row in record["rows"]]
    table(rows, COLUMNS, title="how many times as fast as the peer; spread: lowest and highest round")


def _spread(spread: list[float] | None) -> str | None:
    return None if spread is None else f"{spread[0]:.3g} to {spread[1]:.3g}"


def _shape(text: str) -> tuple[int, int]:
    rows, by, columns = text.partition("x")
    if not (by and rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        raise BadInput(f"shape {text!r}", "a shape is OUTxIN", "pass for example 2048x8192")
    return int(rows), int(columns)


def _numbers(text: str, kind: type[Any]) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(f"{text!r}", f"it is no list of {'whole ' if kind is int else ''}numbers", "pass for example 1,8") from error
    if not all(number > 0 for number in found):
        raise BadInput(f"{text!r}", "every number is above 0")
    return found
