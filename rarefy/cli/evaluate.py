"""`rarefy eval`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rarefy.cli.arguments import Device, Json, Model, Text, Tokens
from rarefy.cli.loading import load
from rarefy.cli.main import app
from rarefy.cli.output import line, show
from rarefy.cli.prune import need_tokenizer
from rarefy.hub.text import heldout_ids
from rarefy.probes.perplexity import perplexity


@app.command("eval", epilog="Examples:  rarefy eval demo   ·   rarefy eval half --tokens 4096 --json")
def evaluate(
    model: Model,
    text: Text = None,
    tokens: Tokens = 16384,
    window: Annotated[int, typer.Option(help="Tokens a window, BOS included.", min=2)] = 512,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window; default: no overlap.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Load in this dtype; default: as stored.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Perplexity on held-out text, with its protocol and its 95% interval."""
    loaded = load(model, dtype=dtype, device=device)
    tokenizer = need_tokenizer(loaded)
    record = perplexity(loaded.model, heldout_ids(tokenizer, tokens, text).to(device), tokens=tokens, window=window, stride=stride, bos=tokenizer.bos_token_id)
    show({**record, "model": model}, as_json, _draw)


def _draw(r: dict[str, Any]) -> None:
    interval = "" if r["interval"] is None else f"  (95%: {r['interval'][0]:.2f} to {r['interval'][1]:.2f})"
    line(f"perplexity {r['perplexity']:.3f}{interval}")
    line(f"{r['tokens']} tokens in {r['windows']} windows of {r['window']}, stride {r['stride']}, bos {r['bos']}, {r['dtype']}")
    if r["tokens"] < 16000:
        line("Fewer than 16,000 tokens: a check, not a figure to quote.")
