"""`rarefy prune`."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rarefy.cli import names
from rarefy.cli.arguments import Calibration, CalibrationTokens, Device, Force, Json, Model, Out, Seed
from rarefy.cli.loading import check_out, load, load_or_stream, need_plain, window
from rarefy.cli.main import app
from rarefy.cli.output import bars, err, line, show, table, text
from rarefy.cli.resuming import finished, resumable
from rarefy.core.errors import BadInput
from rarefy.hub.export import clear_drafts, save_dense
from rarefy.hub.tensor_file import write_tensors
from rarefy.hub.text import calibration_batches
from rarefy.weights.checkpoint import Checkpoint
from rarefy.weights.masks import apply_masks, read_masks
from rarefy.weights.prune import prune as prune_model

MASKS = "masks.safetensors"  # packed bits, one 1-D tensor per site; shapes are in the record

BESIDE_MASKS = {"model", "out", "masks", "dtype", "device", "force", "as_json"}

NAMED = 5  # matrices that a warning names

EPILOG = "Examples:  rarefy prune demo --recipe sparsegpt --density 0.5 --out half   ·   rarefy prune demo --recipe wanda --pattern 2:4 --out two-four --json   ·   rarefy prune demo --masks masks.safetensors --out half"


@app.command(epilog=EPILOG)
def prune(
    context: typer.Context,
    model: Model,
    out: Out,
    recipe: Annotated[str, typer.Option(help="See `rarefy methods`.")] = "sparsegpt",
    density: Annotated[float, typer.Option(help="Fraction of the weights that is kept.")] = 0.5,
    pattern: Annotated[str | None, typer.Option(help="matrix, row, 2:4, 2:4:16, block:4x1, row-block:1x32, rows, columns; default: the recipe's.")] = None,
    criterion: Annotated[str | None, typer.Option(help="Replace the recipe's solver by keeping what this criterion rates best.")] = None,
    allocation: Annotated[str | None, typer.Option(help="Replace the recipe's allocation, e.g. outlier-share:spread=0.1.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Only modules that match this glob; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="No modules that match this glob; may be repeated.")] = None,
    mode: Annotated[str, typer.Option(help="cascade or parallel statistics.")] = "cascade",
    errors: Annotated[bool, typer.Option(help="Measure errors on the calibration inputs; without, on the weights alone.")] = True,
    masks: Annotated[
        str | None, typer.Option(help="Prune by the masks of this safetensors file: a matrix's name, and 1 where a weight stays; recipe and density play no part.")
    ] = None,
    stream: Annotated[bool | None, typer.Option(help="Leave the weights in their files and read a block at a time; default: where the folder is larger than memory.")] = None,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 8192,
    dtype: Annotated[str | None, typer.Option(help="Load in this dtype; default: as stored.")] = None,
    device: Device = "cpu",
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Prune a model in one pass and write it as a plain folder with zeros."""
    if masks is not None:
        _refuse_beside_masks(context)
        show({**by_masks(model, masks, out, dtype, device, force=force), "out": out}, as_json, _draw)
        return
    chosen = names.recipe(recipe, criterion=criterion, allocation=allocation, pattern=pattern)
    check_density(density)
    check_out(out, model, force=force)
    whole = Path(out).absolute()
    checkpoint = Checkpoint(whole.with_name(f"{whole.name}.partial"), replace=force, on_resume=_say_resumed)
    with checkpoint.locked(), resumable(finished(checkpoint, "blocks")):
        clear_drafts(whole)
        began = time.monotonic()
        loaded, weights = load_or_stream(model, stream, dtype=dtype, device=device)
        need_plain(loaded)
        batches = to_device(calibration_batches(need_tokenizer(loaded), calibration_tokens, window(loaded), seed, calibration), device)
        loaded_at = time.monotonic()
        with bars(as_json) as progress:
            record = prune_model(
                loaded.model,
                batches,
                chosen,
                density=density,
                include=include or (),
                exclude=exclude or (),
                mode=mode,
                errors=errors,
                seed=seed,
                progress=progress,
                checkpoint=checkpoint,
                weights=weights,
            )
        record = {
            **record,
            "calibration": {"text": calibration or "embedded", "tokens": sum(b["input_ids"].numel() for b in batches)},
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        timings = {"load_s": loaded_at - began, "prune_s": time.monotonic() - loaded_at}
        extra = {MASKS: lambda path: _write_masks(path, record["sites"], checkpoint)}
        save_dense(loaded.model, loaded.tokenizer, out, force=force, record=record, timings=timings, write=weights.write if weights else None, extra=extra)
        checkpoint.remove()
    warn_emptied(record["emptied"])
    show({**record, "out": out}, as_json, _draw)


def _refuse_beside_masks(context: typer.Context) -> None:
    """BadInput: an option that says what to prune was named, though the masks say it all."""
    for name in sorted(context.params.keys() - BESIDE_MASKS):
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":  # by name: typer brings its own copy of click's enumeration
            raise BadInput(f"--masks and --{name.replace('_', '-')}", "masks say all that is pruned", "pass one of them")


def by_masks(model: str, file: str, out: str, dtype: str | None, device: str, *, force: bool) -> dict[str, Any]:
    """Prune a model by a file of masks and write it; the record."""
    check_out(out, model, force=force)
    given = read_masks(file)
    loaded = load(model, dtype=dtype, device=device)
    need_plain(loaded)
    record = {**apply_masks(loaded.model, given), "masks": Path(file).name, "threads": torch.get_num_threads(), "versions": versions()}
    save_dense(loaded.model, loaded.tokenizer, out, force=force, record=record)
    warn_emptied(record["emptied"])
    return record


def _write_masks(path: Path, sites: list[dict[str, Any]], checkpoint: Checkpoint) -> None:
    """The packed masks of all sites, one in memory at a time."""
    kinds = {s["name"]: (torch.uint8, (-(-math.prod(s["shape"]) // 8),)) for s in sites}
    write_tensors(path, kinds, lambda name: checkpoint.tensor(f"mask:{name}"))


def _say_resumed(finished: int, groups: int) -> None:
    err.print(f"resumed after {finished} of {groups} blocks", highlight=False, soft_wrap=True)


def check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise BadInput(f"density {density}", "a density is the fraction of weights that is kept, in (0, 1]", "pass for example --density 0.5")


def warn_emptied(names: list[str]) -> None:
    """Matrices that keep nothing are named, since what runs through them is lost."""
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        one = len(names) == 1
        what = "1 matrix keeps no weight at all and computes zeros" if one else f"{len(names)} matrices keep no weight at all and compute zeros"
        err.print(f"warning: {what}: {', '.join(names[:NAMED])}{more}; a larger --density or another --allocation keeps some", highlight=False, soft_wrap=True)


def need_tokenizer(loaded: Any) -> Any:
    if loaded.tokenizer is None:
        raise BadInput(f"{loaded.spec} has no tokenizer", "calibration and evaluation read text", "put the tokenizer's files beside the model")
    return loaded.tokenizer


def to_device(batches: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    return [{k: v.to(device) for k, v in batch.items()} for batch in batches]


def versions() -> dict[str, str]:
    import transformers

    import rarefy

    return {"rarefy": rarefy.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def kin(name: str) -> str:
    """What the same matrix of every block, and of every expert, is called."""
    return ".".join(part for part in re.sub(r"\[\d+\]", "", name.removesuffix(".weight")).split(".") if not part.isdigit())


def error_of(sites: list[dict[str, Any]]) -> str:
    """What the errors of these sites are relative to: their outputs, or the weights alone where no output was measured."""
    alone = sum(s["error_on"] == "weight" for s in sites)
    if sites and alone == len(sites):
        return "relative error of the weights; no output was measured"
    return "relative output error" + (f"; of the weights alone at {alone} of {len(sites)} matrices" if alone else "")


def _draw(record: dict[str, Any]) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for site in record["sites"]:
        groups.setdefault(kin(site["name"]), []).append(site)
    rows = [
        {
            "matrices": name,
            "n": len(sites),
            "density": sum(s["kept"] for s in sites) / max(sum(math.prod(s["shape"]) for s in sites), 1),
            "error, mask only": sum(s["error_mask_only"] for s in sites) / len(sites),
            "error": sum(s["error"] for s in sites) / len(sites),
        }
        for name, sites in groups.items()
    ]
    table(rows, ["matrices", "n", "density", "error, mask only", "error"], f"{record['recipe']} · {record['pattern']} · {record['model']} (mean {error_of(record['sites'])})")
    line(f"density {text(record['density'])} where {text(record['density_requested'])} was asked; written to {record['out']}")
