"""`rarefy generate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rarefy.cli.arguments import Device, Json, Model
from rarefy.cli.kernels import say_absent
from rarefy.cli.loading import load
from rarefy.cli.main import app
from rarefy.cli.output import err, line, megabytes, show
from rarefy.cli.prune import need_tokenizer
from rarefy.probes.generation import generate as run


@app.command(epilog="Examples:  rarefy generate demo --prompt 'The capital of France is'   ·   rarefy generate half --tokens 32 --json")
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "Sparse neural networks are",
    tokens: Annotated[int, typer.Option(help="New tokens.", min=1)] = 64,
    runs: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 3,
    engine: Annotated[str, typer.Option(help="native, transformers, or auto: native where the model allows it.")] = "auto",
    head: Annotated[str | None, typer.Option(help="Layout of the output head while decoding natively, e.g. int8; default: as stored.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Load in this dtype; default: as stored.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Greedy text with its speed and its memory."""
    if engine != "transformers":
        say_absent()
    loaded = load(model, dtype=dtype, device=device)
    record = run(loaded.model, need_tokenizer(loaded), prompt, tokens=tokens, runs=runs, engine=engine, head=head)
    if record["warning"]:
        err.print(f"warning: {record['warning']}", highlight=False, soft_wrap=True)
    show({**record, "model": model}, as_json, lambda r: _draw(prompt, r))


def _draw(prompt: str, r: dict[str, Any]) -> None:
    line(prompt + r["text"])
    decode = "-" if r["decode_tokens_per_s"] is None else f"{r['decode_tokens_per_s']:.1f} ({r['decode_spread'][0]:.1f} to {r['decode_spread'][1]:.1f})"
    line(
        f"\n{r['tokens']} tokens by {r['engine']}; prefill {r['prefill_tokens_per_s']:.1f} tokens/s, decode {decode} tokens/s; model {megabytes(r['model_bytes'])}, process {megabytes(r['rss_bytes'])}"
    )
