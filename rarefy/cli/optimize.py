"""`rarefy optimize`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rarefy.cli import names
from rarefy.cli.arguments import Calibration, CalibrationTokens, Device, Force, Json, Model, Out, Seed, Text, Tokens
from rarefy.cli.compare import scorer
from rarefy.cli.heal import count, texts
from rarefy.cli.loading import check_out, load, need_plain, window
from rarefy.cli.main import app
from rarefy.cli.output import bars, err, line, megabytes, show, table
from rarefy.cli.prune import need_tokenizer, to_device, versions, warn_emptied
from rarefy.cli.resuming import resumable
from rarefy.core.discover import pick
from rarefy.core.errors import BadInput
from rarefy.core.records import Recipe
from rarefy.hub.cache import cache_dir
from rarefy.hub.export import save_dense
from rarefy.hub.load import Loaded
from rarefy.hub.text import calibration_batches, heldout_ids
from rarefy.layouts import LAYOUTS
from rarefy.runtime.choose import Chooser
from rarefy.search.optimize import Data, Levers, optimize_for
from rarefy.search.targets import TARGETS, Target
from rarefy.surgery.adapters import Adaptation
from rarefy.weights.optimize import optimize as search

EPILOG = (
    "Examples:  rarefy optimize demo --max-loss 5% --out small   ·   rarefy optimize DIR --max-loss 0.02 --recipes sparsegpt --out small --json   ·   "
    "rarefy optimize demo --target speed --max-loss 5% --out fast   ·   "
    "rarefy optimize demo --target sparse-speed --bits none --heal spp --heal-tokens 20k --out healed"
)
FORMS = ("form", "precision", "density", "loss", "interval", "ok", "file_bytes", "tokens_per_s", "over_base", "spread", "over_dense")


@app.command(epilog=EPILOG)
def optimize(
    model: Model,
    out: Out,
    max_loss: Annotated[str, typer.Option(help="Relative rise in held-out perplexity, e.g. 5%; the point estimate decides, its interval is printed.")] = "5%",
    recipes: Annotated[str, typer.Option(help="Candidates, separated by commas: each is searched over density.")] = "sparsegpt",
    allocations: Annotated[str, typer.Option(help="Allocations to search with each recipe; 'default' is the recipe's own.")] = "default,global",
    target: Annotated[
        str | None,
        typer.Option(
            help="What to win: speed, size, memory, or sparse-speed (over the same bits with nothing left out), by all levers, measured and packed; default: the sparsest weights, a plain folder."
        ),
    ] = None,
    bits: Annotated[str, typer.Option(help="With --target: layouts with fewer bits to try, separated by commas; none for none.")] = "int8,int4,int4-asymmetric",
    heal: Annotated[str, typer.Option(help="With --target: also heal what each recipe pruned, at every density tried: spp, lors, masked-lora or full; none for none.")] = "none",
    heal_tokens: Annotated[str, typer.Option(help="With --heal: training tokens a try: 20k, 8192.")] = "20k",
    gates: Annotated[str, typer.Option(help="With --target speed or sparse-speed: gatings to try, each searched over density; none for none.")] = "uniform-threshold",
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 8192,
    text: Text = None,
    tokens: Tokens = 16384,
    device: Device = "cpu",
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """The sparsest form of a model that loses at most so much, as a plain folder; or (--target) its fastest, smallest or leanest one, packed."""
    if target is None and _some(heal):
        raise BadInput(f"--heal {heal} without --target", "only the search for a target heals", f"pass --target {next(iter(TARGETS))}, or run rarefy heal on what is written")
    budget, chosen = names.share(max_loss), candidates(names.listed(recipes), names.listed(allocations))
    check_out(out, model, force=force)
    loaded = load(model, device=device)
    need_plain(loaded)
    need_tokenizer(loaded)
    if target is not None:
        wanted = pick(TARGETS, target, "target")
        levers = Levers(
            bits=tuple(_some(bits)),
            recipes=tuple(chosen),
            healings=tuple(names.part(Adaptation, method) for method in _some(heal)),
            gatings=tuple(names.gating(gate) for gate in _some(gates)),
        )
        training = count(heal_tokens) if levers.healings else None
        for name in levers.bits:
            pick(LAYOUTS, name, "layout")
        with bars(as_json) as progress:
            found = aim(loaded, {Path(out): wanted}, levers, budget, calibration, calibration_tokens, text, tokens, training, seed, force, progress)
        show({**found[Path(out)], "target": target, "out": out}, as_json, draw_forms)
        return
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
            "held_out": {"text": text or "embedded", "tokens": ids.numel()},
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        warn_emptied(saved.get("emptied", []))
        save_dense(loaded.model, loaded.tokenizer, out, force=force, record=saved, timings={"optimize_s": time.monotonic() - began})
    journal.unlink(missing_ok=True)
    return record


def _some(text: str) -> list[str]:
    return [] if text == "none" else names.listed(text)


def aim(
    loaded: Loaded,
    targets: Mapping[Path, Target],
    levers: Levers,
    budget: float,
    calibration: str | None,
    calibration_tokens: int,
    text: str | None,
    tokens: int,
    training: int | None,
    seed: int,
    force: bool,
    progress: Any,
) -> dict[Path, dict[str, Any]]:
    """The search on embedded or named texts; `training` is the number of tokens to heal on, of the calibration text that is not held out."""
    room = window(loaded)
    batches = calibration_batches(loaded.tokenizer, calibration_tokens, room, seed, calibration)
    windows, ids = ([], heldout_ids(loaded.tokenizer, tokens, text)) if training is None else texts(loaded, training, calibration, text, tokens, seed)
    data = Data(batches, ids, loaded.tokenizer.bos_token_id, room, windows)
    chooser = Chooser((1,), cache_dir() / "layouts.json")
    return optimize_for(loaded, data, targets, levers, max_loss=budget, layout=chooser, force=force, seed=seed, progress=progress)


def draw_forms(record: dict[str, Any]) -> None:
    rows = [{**row, "over_base": row["over_base"], "spread": [row["over_base_min"], row["over_base_max"]]} for row in record["forms"]]
    table(rows, FORMS, f"within {record['max_loss']:.1%} of relative perplexity; over_base: how many times as fast as the same bits with nothing left out")
    best = next(row for row in record["forms"] if row["form"] == record["chosen"])
    low, high = record["interval"]
    line(
        f"{record['chosen']}: {best['tokens_per_s']:.4g} tokens/s, {megabytes(best['file_bytes'])}, loss {record['loss']:.2%} (95%: {low:.2%} to {high:.2%}); "
        f"written to {record['out']}"
    )
    if record["warning"]:
        err.print(f"warning: {record['warning']}", highlight=False, soft_wrap=True)


def draw(record: dict[str, Any]) -> None:
    table(record["tried"], ["recipe", "allocation", "density", "loss", "interval", "ok", "reused"], f"within {record['max_loss']:.1%} of relative perplexity")
    if record["chosen"] is None:
        line(f"No density in reach stays within {record['max_loss']:.1%}: the dense model is kept.")
        return
    low, high = record["interval"]
    line(
        f"{record['chosen']['recipe']} ({record['chosen']['allocation']}) at density {record['chosen']['density']:.4g}: loss {record['loss']:.2%} (95%: {low:.2%} to {high:.2%}); written to {record.get('out', '')}"
    )
