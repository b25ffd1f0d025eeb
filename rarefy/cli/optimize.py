"""`rarefy optimize`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rarefy.cli import names
from rarefy.cli.arguments import Calibration, CalibrationTokens, Device, Force, Json, Model, Out, Seed, Text, Tokens
from rarefy.cli.compare import scorer
from rarefy.cli.loading import check_out, load, need_plain, window
from rarefy.cli.main import app
from rarefy.cli.output import bars, line, show, table
from rarefy.cli.prune import need_tokenizer, to_device, versions, warn_emptied
from rarefy.cli.resuming import resumable
from rarefy.core.records import Recipe
from rarefy.hub.export import save_dense
from rarefy.hub.load import Loaded
from rarefy.hub.text import calibration_batches, heldout_ids
from rarefy.weights.optimize import optimize as search


@app.command(epilog="Examples:  rarefy optimize demo --max-loss 5% --out small   ·   rarefy optimize DIR --max-loss 0.02 --recipes sparsegpt --out small --json")
def optimize(
    model: Model,
    out: Out,
    max_loss: Annotated[str, typer.Option(help="Relative rise in held-out perplexity, e.g. 5%; the point estimate decides, its interval is printed.")] = "5%",
    recipes: Annotated[str, typer.Option(help="Candidates, separated by commas: each is searched over density.")] = "sparsegpt",
    allocations: Annotated[str, typer.Option(help="Allocations to search with each recipe; 'default' is the recipe's own.")] = "default,global",
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 8192,
    text: Text = None,
    tokens: Tokens = 16384,
    device: Device = "cpu",
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """The sparsest form of a model that loses at most so much, written as a plain folder."""
    budget, chosen = names.share(max_loss), candidates(names.listed(recipes), names.listed(allocations))
    check_out(out, model, force=force)
    loaded = load(model, device=device)
    need_plain(loaded)
    need_tokenizer(loaded)
    with bars(as_json) as progress:
        record = run(loaded, budget, chosen, calibration, calibration_tokens, text, tokens, device, seed, out, force, progress)
    show({**record, "out": out}, as_json, draw)


def candidates(recipes: list[str], allocations: list[str]) -> list[Recipe]:
    """Every recipe with every allocation, `default` being its own."""
    return [names.recipe(r, allocation=None if a == "default" else a) for r in recipes for a in allocations]


def run(
    loaded: Loaded,
    budget: float,
    chosen: list[Recipe],
    calibration: str | None,
    calibration_tokens: int,
    text: str | None,
    tokens: int,
    device: str,
    seed: int,
    out: str,
    force: bool,
    progress: Any,
) -> dict[str, Any]:
    batches = to_device(calibration_batches(loaded.tokenizer, calibration_tokens, window(loaded), seed, calibration), device)
    ids = heldout_ids(loaded.tokenizer, tokens, text).to(device)
    evaluate = scorer(loaded)
    began = time.monotonic()
    journal = Path(f"{out.rstrip('/')}.tries.json")
    with resumable(lambda: f"the finished tries are kept in {journal}" if journal.is_file() else None):
        record, pruned = search(loaded.model, batches, chosen, lambda m: evaluate(m, ids), max_loss=budget, seed=seed, journal=journal, progress=progress)
        saved = {
            **(pruned or {"model": loaded.spec, "recipe": "dense", "pattern": "", "density": 1.0, "sites": []}),
            "optimize": record,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        warn_emptied(saved.get("emptied", []))
        save_dense(loaded.model, loaded.tokenizer, out, force=force, record=saved, timings={"optimize_s": time.monotonic() - began})
    journal.unlink(missing_ok=True)
    return record


def draw(record: dict[str, Any]) -> None:
    table(record["tried"], ["recipe", "allocation", "density", "loss", "interval", "ok", "reused"], f"within {record['max_loss']:.1%} of relative perplexity")
    if record["chosen"] is None:
        line(f"No density in reach stays within {record['max_loss']:.1%}: the dense model is kept.")
        return
    low, high = record["interval"]
    line(
        f"{record['chosen']['recipe']} ({record['chosen']['allocation']}) at density {record['chosen']['density']:.4g}: loss {record['loss']:.2%} (95%: {low:.2%} to {high:.2%}); written to {record.get('out', '')}"
    )
