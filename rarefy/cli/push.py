"""`rarefy push`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rarefy.cli.arguments import Json
from rarefy.cli.loading import quiet
from rarefy.cli.main import app
from rarefy.cli.output import line, megabytes, show
from rarefy.hub.push import push as upload


@app.command(epilog="Examples:  rarefy push half-packed me/half-packed   ·   rarefy push half me/half --private --json")
def push(
    folder: Annotated[str, typer.Argument(help="A folder that prune, optimize, heal, pack or unpack wrote.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face Hub; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a model folder to the Hugging Face Hub with its card, in one commit; log in first with `hf auth login`."""
    quiet()
    show({"model": folder, **upload(folder, repository, private=private or None)}, as_json, _draw)


def _draw(r: dict[str, Any]) -> None:
    line(f"{len(r['files'])} files, {megabytes(sum(file['bytes'] for file in r['files']))}, uploaded to {r['repository']}: {r['url']}")
