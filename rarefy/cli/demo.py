"""`rarefy demo`: the main job on the embedded model. `make demo` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli import optimize as optimizing
from rarefy.cli.arguments import CalibrationTokens, Tokens
from rarefy.cli.compare import COLUMNS, candidates, measure
from rarefy.cli.loading import load
from rarefy.cli.main import app
from rarefy.cli.output import bars, line, megabytes, table
from rarefy.hub.demo import MODEL
from rarefy.hub.text import calibration_batches, heldout_ids
from rarefy.probes.report import write_report


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Where the sparse model, the report and the finished rows go.")] = "out/demo",
    max_loss: Annotated[str, typer.Option(help="Budget of the search.")] = "5%",
    calibration_tokens: CalibrationTokens = 8192,
    tokens: Tokens = 4096,
) -> None:
    """Make the embedded 135M language model sparse within 5% of its perplexity, then compare methods."""
    folder = Path(out)
    line(f"The embedded model: SmolLM2-135M-Instruct, a Q4_1 file of {megabytes(MODEL.path().stat().st_size)}, read as float32.")
    _search(folder, max_loss, calibration_tokens, tokens)
    loaded = load("demo")
    with bars() as progress:
        chosen = candidates(["magnitude", "wanda", "sparsegpt"], ["0.5"], ["default", "2:4"])
        batches = calibration_batches(loaded.tokenizer, calibration_tokens)
        record = measure(loaded, batches, chosen, heldout_ids(loaded.tokenizer, tokens), 0, str(folder / "compare.json"), progress)
    table(record["rows"], [*COLUMNS, "reused"], f"Perplexity over {record['summary']['tokens']} held-out tokens; the input file has {MODEL.path().stat().st_size:,} bytes")
    line("bytes: float32 with zeros. bitmask_bytes: modelled, one bit a weight and the kept values in float32.")
    line(f"report: {write_report(folder / 'model')}")


def _search(folder: Path, max_loss: str, calibration_tokens: int, tokens: int) -> None:
    if (folder / "model" / "prune.json").is_file():
        line(f"The search was finished earlier and is reused: {folder / 'model'} (delete it to search again).")
        return
    from rarefy.cli.names import share

    with bars() as progress:
        record = optimizing.run(
            load("demo"),
            share(max_loss),
            optimizing.candidates(["sparsegpt"], ["default"]),
            None,
            calibration_tokens,
            None,
            tokens,
            "cpu",
            0,
            str(folder / "model"),
            False,
            progress,
        )
    optimizing.draw({**record, "out": str(folder / "model")})
