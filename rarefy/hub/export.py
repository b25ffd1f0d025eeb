"""A pruned model as a plain folder with zeros: loads anywhere, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from glob import escape
from pathlib import Path
from typing import Any

from rarefy.hub.atomic import atomic_folder

RECORD = "prune.json"
TIMINGS = "timings.json"


def save_dense(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    *,
    force: bool = False,
    record: Mapping[str, Any] | None = None,
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
        write: writes config and weights into a folder, where the model does not hold its weights.
        extra: {file name: what writes it}; they appear with the folder, so that none can be missing.

    Returns:
        The folder.

    Raises:
        Refused: the folder exists and is not empty, cannot be written, or the disk is full; nothing is left behind.
    """
    target = Path(out)
    with atomic_folder(target, force=force) as draft:
        _plain_config(model)
        (write or model.save_pretrained)(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        if record is not None:
            (draft / RECORD).write_text(json.dumps({**record, "out": target.name}, indent=1) + "\n")
            (draft / "README.md").write_text(_card(record))
        if timings is not None:
            (draft / TIMINGS).write_text(json.dumps(dict(timings), indent=1) + "\n")
        for name, put in (extra or {}).items():
            put(draft / name)
    return target


def clear_drafts(out: Path) -> None:
    """Remove what runs that were killed while they wrote `out` have left beside it; call it where no other run can be writing."""
    for draft in out.parent.glob(f".{escape(out.name)}.tmp-*"):
        shutil.rmtree(draft, ignore_errors=True)


def _plain_config(model: Any) -> None:
    """transformers refuses to save what came from a GGUF file until it forgets that it was quantised: the tensors are plain."""
    if getattr(model, "hf_quantizer", None) is not None and getattr(getattr(model.config, "quantization_config", None), "quant_method", "") == "gguf":
        model.hf_quantizer = None
        del model.config.quantization_config
        model.is_quantized = False


def _card(record: Mapping[str, Any]) -> str:
    return (
        f"# {record['model']}, pruned\n\n"
        f"Pruned with rarefy: recipe `{record['recipe']}`, pattern `{record['pattern']}`, {record['density']:.4%} of the weights in "
        f"{len(record['sites'])} matrices kept. The weights are dense with zeros and load in plain transformers.\n"
        "`prune.json` holds the record of every matrix.\n"
    )
