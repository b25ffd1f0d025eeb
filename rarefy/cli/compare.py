"""`rarefy compare`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from rarefy.cli import names
from rarefy.cli.arguments import Calibration, CalibrationTokens, Device, Json, Model, Seed, Text, Tokens
from rarefy.cli.loading import load, need_plain, window
from rarefy.cli.main import app
from rarefy.cli.output import bars, show, table
from rarefy.cli.prune import check_density, need_tokenizer, to_device, versions
from rarefy.core.collect import collect_all
from rarefy.core.journal import Journal
from rarefy.core.records import Recipe
from rarefy.hub.load import Loaded
from rarefy.hub.text import calibration_batches, heldout_ids
from rarefy.probes.compare import compare as run
from rarefy.probes.perplexity import token_nll
from rarefy.weights.patterns import parse_pattern
from rarefy.weights.prune import dense_statistics, trial_key
from rarefy.weights.sites import find_sites

COLUMNS = ["method", "pattern", "density", "value", "relative", "interval", "error", "bytes", "bitmask_bytes"]


@app.command(epilog="Examples:  rarefy compare demo --recipes magnitude,wanda,sparsegpt --densities 0.5 --patterns default,2:4")
def compare(
    model: Model,
    recipes: Annotated[str, typer.Option(help="Recipes, separated by commas.")] = "magnitude,wanda,sparsegpt",
    densities: Annotated[str, typer.Option(help="Densities, separated by commas.")] = "0.5",
    patterns: Annotated[str, typer.Option(help="Patterns, separated by commas; 'default' is the recipe's own.")] = "default",
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 8192,
    text: Text = None,
    tokens: Tokens = 16384,
    device: Device = "cpu",
    seed: Seed = 0,
    journal: Annotated[str | None, typer.Option(help="A JSON file of finished rows: a second run repeats none.")] = None,
    as_json: Json = False,
) -> None:
    """Several recipes on the same model, calibration and held-out tokens, in one table."""
    chosen = candidates(names.listed(recipes), names.listed(densities), names.listed(patterns))
    loaded = load(model, device=device)
    need_plain(loaded)
    batches = to_device(calibration_batches(need_tokenizer(loaded), calibration_tokens, window(loaded), seed, calibration), device)
    with bars(as_json) as progress:
        record = measure(loaded, batches, chosen, heldout_ids(loaded.tokenizer, tokens, text).to(device), seed, journal, progress)
    show(record, as_json, lambda r: table(r["rows"], COLUMNS, f"{model}: perplexity over {r['summary']['tokens']} tokens"))


def candidates(recipes: Sequence[str], densities: Sequence[str], patterns: Sequence[str]) -> list[tuple[Recipe, float]]:
    found = []
    for pattern in patterns:
        for density in map(names.share, densities):
            check_density(density)
            for name in recipes:
                recipe = names.recipe(name)
                found.append((recipe if pattern == "default" else dataclasses.replace(recipe, pattern=parse_pattern(pattern)), density))
    return found


def measure(loaded: Loaded, batches: list[dict[str, Tensor]], chosen: Sequence[tuple[Recipe, float]], ids: Tensor, seed: int, journal: str | None, progress: Any) -> dict[str, Any]:
    """The comparison with dense statistics shared, rows kept in the journal."""
    setting = hashlib.sha256(repr((loaded.spec, versions(), torch.get_num_threads(), ids.tolist(), [b["input_ids"].tolist() for b in batches])).encode()).hexdigest()[:16]
    book = Journal(journal, setting) if journal else None
    evaluate = scorer(loaded)
    fresh = [r for r, _ in chosen] if book is None else [r for r, d in chosen if book.get(trial_key(r, d, seed)) is None]
    stats = collect_all(loaded.model, batches, find_sites(loaded.model), dense_statistics(fresh), progress=progress) if fresh else {}
    return run(loaded.model, chosen, lambda m: evaluate(m, ids), statistics=stats, seed=seed, progress=progress, book=book)


def scorer(loaded: Loaded) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, ids: token_nll(model, ids, window(loaded), None, loaded.tokenizer.bos_token_id)
