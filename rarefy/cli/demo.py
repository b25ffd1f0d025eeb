"""`rarefy demo`: the main job on the embedded model. `make demo` runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli import names
from rarefy.cli import optimize as optimizing
from rarefy.cli.arguments import CalibrationTokens, Tokens
from rarefy.cli.compare import COLUMNS, candidates, measure
from rarefy.cli.loading import load
from rarefy.cli.main import app
from rarefy.cli.output import bars, line, megabytes, table
from rarefy.hub.demo import MODEL
from rarefy.hub.text import calibration_batches, heldout_ids
from rarefy.probes.report import write_report
from rarefy.search.optimize import RECORD, Levers
from rarefy.search.targets import TARGETS


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Where the chosen model, the report and the finished rows go.")] = "out/demo",
    max_loss: Annotated[str, typer.Option(help="Budget of the search.")] = "5%",
    calibration_tokens: CalibrationTokens = 8192,
    tokens: Tokens = 4096,
) -> None:
    """Find the fastest form of the embedded 135M language model within 5% of its perplexity, packed and timed, then compare pruning methods."""
    folder = Path(out)
    line(f"The embedded model: SmolLM2-135M-Instruct, a Q4_1 file of {megabytes(MODEL.path().stat().st_size)}, read as float32.")
    line("Being Q4_1, it loses nothing in int4-asymmetric: on this model, those bits are no achievement.")
    _search(folder / "model", max_loss, calibration_tokens, tokens)
    loaded = load("demo")
    with bars() as progress:
        chosen = candidates(["magnitude", "wanda", "sparsegpt"], ["0.5"], ["default", "2:4"])
        batches = calibration_batches(loaded.tokenizer, calibration_tokens)
        record = measure(loaded, batches, chosen, heldout_ids(loaded.tokenizer, tokens), 0, str(folder / "compare.json"), progress)
    table(record["rows"], [*COLUMNS, "reused"], f"Perplexity over {record['summary']['tokens']} held-out tokens; the input file has {MODEL.path().stat().st_size:,} bytes")
    line("bytes: float32 with zeros. bitmask_bytes: modelled, one bit a weight and the kept values in float32.")
    line(f"report: {write_report(folder / 'model')}")


def _search(out: Path, max_loss: str, calibration_tokens: int, tokens: int) -> None:
    kept = out / RECORD
    if kept.is_file():
        line(f"The search was finished earlier and is reused: {out} (delete it to search again).")
        optimizing.draw_forms({**json.loads(kept.read_text()), "out": str(out)})
        return
    levers = Levers(bits=("int4-asymmetric",), recipes=(names.recipe("sparsegpt"),), gatings=(names.gating("uniform-threshold"),))
    with bars() as progress:
        record = optimizing.aim(load("demo"), TARGETS["speed"], levers, names.share(max_loss), None, calibration_tokens, None, tokens, 0, str(out), False, progress)
    optimizing.draw_forms({**record, "out": str(out)})
