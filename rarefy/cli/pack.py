"""`rarefy pack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli.arguments import Device, Force, Json, Model, Out
from rarefy.cli.loading import load
from rarefy.cli.main import app
from rarefy.cli.output import line, megabytes, show
from rarefy.hub.atomic import check_target
from rarefy.hub.packed import save_packed

EPILOG = "Example:  rarefy pack half --layout bitmask --out half-packed"


@app.command(epilog=EPILOG)
def pack(
    model: Model,
    out: Out,
    layout: Annotated[str, typer.Option(help="How the sparse matrices are stored.")] = "bitmask",
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Store a pruned model without its zeros; `import rarefy` and from_pretrained load it again."""
    check_target(Path(out), force=force)
    loaded = load(model, device=device)
    record = save_packed(loaded.model, loaded.tokenizer, out, layout, force=force)
    show({**record, "model": model, "out": out}, as_json, _draw)


def _draw(r: dict[str, Any]) -> None:
    line(f"{r['packed']} of {len(r['sites'])} matrices packed: {megabytes(r['bytes_dense'])} became {megabytes(r['bytes_stored'])}; written to {r['out']}")
