"""`rarefy demo`: the main job on the embedded model. `make demo` runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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
from rarefy.search.targets import TARGETS, Target


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Where the chosen model, the report and the finished rows go.")] = "out/demo",
    max_loss: Annotated[str, typer.Option(help="Budget of the search.")] = "5%",
    calibration_tokens: CalibrationTokens = 8192,
    tokens: Tokens = 4096,
) -> None:
    """Find the fastest form of the embedded 135M language model within 5% of its perplexity, and the one whose zeros pay most, packed and timed; then compare pruning methods."""
    folder = Path(out)
    line(f"The embedded model: SmolLM2-135M-Instruct, a Q4_1 file of {megabytes(MODEL.path().stat().st_size)}, read as float32.")
    line("Being Q4_1, it loses nothing in int4-asymmetric: on this model, those bits are no achievement.")
    _search({folder / "model": TARGETS["speed"], folder / "sparse": TARGETS["sparse-speed"]}, max_loss, calibration_tokens, tokens)
    loaded = load("demo")
    with bars() as progress:
        chosen = candidates(["magnitude", "wanda", "sparsegpt"], ["0.5"], ["default", "2:4"])
        batches = calibration_batches(loaded.tokenizer, calibration_tokens)
        record = measure(loaded, batches, chosen, heldout_ids(loaded.tokenizer, tokens), 0, str(folder / "compare.json"), progress)
    table(record["rows"], [*COLUMNS, "reused"], f"Perplexity over {record['summary']['tokens']} held-out tokens; the input file has {MODEL.path().stat().st_size:,} bytes")
    line("bytes: float32 with zeros. bitmask_bytes: modelled, one bit a weight and the kept values in float32.")
    line(f"report: {write_report(folder / 'model')}")


def _search(targets: dict[Path, Target], max_loss: str, calibration_tokens: int, tokens: int) -> None:
    missing = {out: target for out, target in targets.items() if not (out / RECORD).is_file()}
    if missing:
        levers = Levers(bits=("int4-asymmetric",), recipes=(names.recipe("sparsegpt"),), gatings=(names.gating("uniform-threshold"),))
        with bars() as progress:
            optimizing.aim(load("demo"), missing, levers, names.share(max_loss), None, calibration_tokens, None, tokens, None, 0, False, progress)
    else:
        line(f"The search was finished earlier and is reused: {', '.join(map(str, targets))} (delete them to search again).")
    records = {out: json.loads((out / RECORD).read_text()) for out in targets}
    (fastest, fast), (leanest, sparse) = records.items()
    optimizing.draw_forms({**fast, "out": str(fastest)})
    line(_zeros(next(row for row in sparse["forms"] if row["form"] == sparse["chosen"]), leanest))


def _zeros(row: dict[str, Any], out: Path) -> str:
    if row["form"] == row["base"]:
        return f"No form that leaves something out was faster than its own bits in every round; {out} holds {row['form']}."
    spread = f"{row['over_base_min']:.3g} to {row['over_base_max']:.3g}"
    return f"Zeros that pay: {row['form']} decodes {row['over_base']:.3g} times ({spread}) as fast as {row['base']}, loss {row['loss']:.2%}; written to {out}"
