"""A pruned model as a plain folder with zeros: loads anywhere, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from glob import escape
from pathlib import Path
from typing import Any

from rarefy.core.attach import gated
from rarefy.core.errors import Refused
from rarefy.hub.atomic import atomic_folder
from rarefy.hub.card import Card, Figure, write_card
from rarefy.surgery.narrow import edits

RECORD = "prune.json"
TIMINGS = "timings.json"


def save_dense(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    *,
    force: bool = False,
    record: Mapping[str, Any] | None = None,
    card: Card | None = None,
    timings: Mapping[str, Any] | None = None,
    write: Callable[[Path], None] | None = None,
    extra: Mapping[str, Callable[[Path], None]] | None = None,
) -> Path:
    """Save model, tokenizer, the record of what was done and a model card.

    Args:
        model: a transformers model whose weights are plain.
        tokenizer: saved beside it, or None.
        out: the folder; must not exist with content unless `force`.
        record: deterministic JSON, written as prune.json; timings apart from it, since they differ run by run.
        card: what the model card says was done; default: what the record says.
        write: writes config and weights into a folder, where the model does not hold its weights.
        extra: {file name: what writes it}; they appear with the folder, so that none can be missing.

    Returns:
        The folder.

    Raises:
        Refused: the model has gates or narrow layers; the folder exists and is not empty, cannot be written, or the disk is full; nothing is left behind.
    """
    for path in gated(model):
        raise Refused(f"the gate on {path}", "a plain folder cannot express it, and would run dense", "save it with rarefy.hub.packed.save_packed")
    for edit in edits(model):
        raise Refused(f"narrow layers {', '.join(edit.rows)}", "a plain config cannot express them", "save them with rarefy.hub.packed.save_packed")
    target = Path(out)
    with atomic_folder(target, force=force) as draft:
        plain_config(model)
        (write or model.save_pretrained)(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        if record is not None:
            (draft / RECORD).write_text(json.dumps({**record, "out": target.name}, indent=1) + "\n")
        if timings is not None:
            (draft / TIMINGS).write_text(json.dumps(dict(timings), indent=1) + "\n")
        for name, put in (extra or {}).items():
            put(draft / name)
        said = card if card is not None or record is None else pruned(record)
        if said is not None:
            write_card(draft, model, said)
    return target


def clear_drafts(out: Path) -> None:
    """Remove what runs that were killed while they wrote `out` have left beside it; call it where no other run can be writing."""
    for draft in out.parent.glob(f".{escape(out.name)}.tmp-*"):
        shutil.rmtree(draft, ignore_errors=True)


def plain_config(model: Any) -> None:
    """transformers refuses to save what came from a GGUF file until it forgets that it was quantised: the tensors are plain."""
    if getattr(model, "hf_quantizer", None) is not None and getattr(getattr(model.config, "quantization_config", None), "quant_method", "") == "gguf":
        model.hf_quantizer = None
        del model.config.quantization_config
        model.is_quantized = False


def pruned(record: Mapping[str, Any]) -> Card:
    """What the record of `prune` or `optimize` says, for the model card."""
    searched = record.get("optimize")
    return Card("pruned", (_step(record),), (*_errors(record), *(() if searched is None else _losses(searched, record.get("held_out", {})))), RECORD)


def _step(record: Mapping[str, Any]) -> str:
    if not record["sites"]:
        return "No density within the budget was found: the weights are those of the dense model."
    pattern = f", pattern `{record['pattern']}`" if record["pattern"] else ""
    allocation = f", allocation `{record['allocation']}`" if record.get("allocation") else ""
    return (
        f"Pruned with recipe `{record['recipe']}`{pattern}{allocation}: {record['density']:.4%} of the weights in {len(record['sites'])} matrices were kept, the others are zero."
    )


def _errors(record: Mapping[str, Any]) -> Iterator[Figure]:
    sites = record["sites"]
    if not sites:
        return
    yield Figure("density", f"{record['density']:.4%}", f"weights kept, counted over {len(sites)} matrices")
    measured = [site["error"] for site in sites if isinstance(site, Mapping) and site.get("error_on") == "inputs"]
    seen = record.get("calibration")
    if measured:
        where = f" ({seen['tokens']} tokens of {seen['text']} text)" if seen else ""
        yield Figure(
            "relative output error", f"{sum(measured) / len(measured):.4f}", f"mean over {len(measured)} matrices of the root error of their outputs on calibration inputs{where}"
        )


def _losses(searched: Mapping[str, Any], heldout: Mapping[str, Any]) -> Iterator[Figure]:
    low, high = searched["interval"]
    tokens = f" on {heldout['tokens']} tokens of {heldout['text']} text" if heldout else ""
    yield Figure(
        "loss", f"{searched['loss']:.2%} (95%: {low:.2%} to {high:.2%})", f"rise of held-out perplexity over the dense model{tokens}; at most {searched['max_loss']:.2%} was asked"
    )
