"""`rarefy export`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli.arguments import Json
from rarefy.cli.loading import load
from rarefy.cli.main import app
from rarefy.cli.output import line, megabytes, show
from rarefy.core.discover import pick
from rarefy.core.errors import Refused
from rarefy.hub.atomic import check_file
from rarefy.hub.llama_cpp import check, export_gguf

FORMATS: dict[str, Callable[..., dict[str, Any]]] = {"gguf": export_gguf}


@app.command(epilog="Examples:  rarefy export half-int4 --out half.gguf   ·   rarefy export half --to gguf --type q8_0 --out half.gguf --json")
def export(
    model: Annotated[str, typer.Argument(help="A Hugging Face name, a folder (dense or packed), a GGUF file, or 'demo'.")],
    out: Annotated[str, typer.Option(help="The file to write.")],
    to: Annotated[str, typer.Option(help="The format: gguf, which llama.cpp reads.")] = "gguf",
    kind: Annotated[
        str, typer.Option("--type", help="How matrices without int4 or int8 codes are stored: f32, f16, bf16, q8_0, q4_1, q4_0; auto: the smallest that changes no value.")
    ] = "auto",
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Leave the tokenizer out: llama.cpp then takes token ids.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """A dense, narrowed or packed Llama-family model as a file that another engine runs: what was used for each tensor, and what it cost."""
    write, target = pick(FORMATS, to, "format"), Path(out)
    check(kind)
    check_file(target, f".{to}", force=force)
    if target.exists() and target.resolve() == Path(model).expanduser().resolve():
        raise Refused(f"--out {out}", "it is the model that is read", "name another file")
    loaded = load(model)
    record = write(loaded.model, None if no_tokenizer else need_tokenizer(loaded), target, kind=kind, name=Path(model).name, force=force)
    show({"model": model, "out": out, **record}, as_json, _draw)


def need_tokenizer(loaded: Any) -> Any:
    if loaded.tokenizer is None:
        raise Refused(f"{loaded.spec} holds no tokenizer", "llama.cpp reads it from the file", "add it to the folder, or pass --no-tokenizer: llama.cpp then takes token ids")
    return loaded.tokenizer


def _draw(r: dict[str, Any]) -> None:
    tokenizer = f"tokenizer {r['tokenizer']}" if r["tokenizer"] else "no tokenizer"
    line(f"{megabytes(r['bytes'])} written to {r['out']}, architecture {r['architecture']}, {tokenizer}")
    for (kind, layout), count in Counter((t["type"], t["layout"]) for t in r["tensors"]).items():
        here = [t for t in r["tensors"] if (t["type"], t["layout"]) == (kind, layout)]
        error = max(t["max_abs_err"] for t in here)
        line(
            f"{count} {'tensor' if count == 1 else 'tensors'} in {kind}, {f'from {layout}' if layout else 'from dense'}, {megabytes(sum(t['bytes'] for t in here))}, {_changed(error)}"
        )
    for tensor in r["tensors"]:
        if tensor["because"]:
            line(f"{tensor['name']} is {tensor['type']}: {tensor['because']}")
    if r["zeros"] > 0.01:
        line(f"{r['zeros']:.1%} of the matrices is zero and stored as zeros: llama.cpp computes with them as with any weight, and gains nothing from them")


def _changed(error: float) -> str:
    return f"largest error {error:.3g}" if error else "no value changed"
