"""The file: written whole beside its place, or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.core.errors import BadInput, MissingExtra
from rarefy.hub.atomic import atomic_file
from rarefy.hub.llama_cpp import places, vocabulary
from rarefy.hub.llama_cpp.blocks import AUTO, Stored, parse_type, store, weight_of
from rarefy.hub.packed import Packed


class Written(np.ndarray):
    """An array that the file's own writer is asked to write: numpy's `tofile` does not say why the disk took no more."""

    def tofile(self, fid: Any, *rest: Any) -> None:
        fid.write(np.ascontiguousarray(self))


def export_gguf(model: Any, tokenizer: Any, out: str | Path, *, kind: str = AUTO, name: str = "rarefy", force: bool = False) -> dict[str, Any]:
    """Write a Llama-family model, dense or packed, as one GGUF file that llama.cpp loads.

    Packed matrices are dequantised: int4, int4-asymmetric and int8 keep their codes as Q4_0, Q4_1 and Q8_0 where the width is a multiple of
    32, every other layout becomes the dense matrix, its zeros as zeros, of which llama.cpp makes nothing. Narrower MLPs are really narrower
    there; where layers differ in width the file's architecture is `deci`, which is Llama with a width to each layer. Norms and biases are float32.

    Args:
        tokenizer: a fast one of transformers; None writes a file without, which takes token ids.
        kind: the type of matrices without codes of their own, a member of `rarefy.hub.llama_cpp.blocks.TYPES`; `auto` is the smallest that
            changes no value.
        name: of the model, in the file.

    Returns:
        {format, architecture, tokenizer, bytes, zeros, tensors: [name, tensor, shape, layout, density, type, bytes, max_abs_err, because]}:
        `zeros` is the fraction of the matrices that is zero, `tensor` the name in the file, `max_abs_err` how far a weight of the file is from ours.

    Raises:
        MissingExtra: gguf. BadInput: a model that is not exported, by name. Refused: gates, a tokenizer that llama.cpp would read otherwise, or as `rarefy.hub.atomic.atomic_file`.
    """
    check(kind)
    from gguf import GGUFWriter

    kind = parse_type(kind)
    found = places.architecture(model)
    arch = places.named(model, found)
    with atomic_file(Path(out), force=force) as draft:
        writer = GGUFWriter(str(draft), arch)
        try:
            places.describe(writer, model, name)
            words = _vocabulary(writer, tokenizer, model.config.vocab_size)
            rows, values = [], []
            for row, stored in _tensors(model, found, kind):
                rows.append(row)
                values.append(stored)
                writer.add_tensor(row["tensor"], stored.view(Written), raw_dtype=_type(row["type"]))
            writer.add_file_type(_most(rows))
            writer.add_quantization_version(2)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        size = draft.stat().st_size
    return {"format": "gguf", "architecture": arch, "tokenizer": words, "bytes": size, "zeros": _zeros(rows), "tensors": rows}


def check(kind: str) -> None:
    """Raise MissingExtra without gguf, and BadInput for a type that is none: before a model is loaded for it."""
    if find_spec("gguf") is None:
        raise MissingExtra("gguf", "hub")
    parse_type(kind)


def _tensors(model: Any, found: places.Architecture, kind: str) -> Iterator[tuple[dict[str, Any], np.ndarray[Any, Any]]]:
    """What is said of each tensor, and its bytes."""
    for place in places.places(model, found):
        packed = isinstance(place.module, Packed) and place.parameter == "weight"
        value = weight_of(place.module) if place.parameter == "weight" else getattr(place.module, place.parameter).detach()
        if not bool(torch.isfinite(value).all()):
            raise BadInput(f"{place.key} with NaN or inf", "llama.cpp would compute nothing else from it", "find where it came from")
        stored = store(place.module, value, kind) if value.dim() == 2 else _vector(value)
        yield _row(place.key, place.name, place.module.layer.layout if packed else None, value, stored), places.turn(stored.data, place.heads)
    extra = places.frequencies(model)
    if extra is not None:
        yield _row("model.rotary_emb.inv_freq", "rope_freqs.weight", None, extra, stored := _vector(extra)), stored.data


def _row(key: str, name: str, layout: str | None, value: Tensor, stored: Stored) -> dict[str, Any]:
    about = {"name": key, "tensor": name, "shape": list(value.shape), "layout": layout, "density": int(torch.count_nonzero(value)) / value.numel()}
    return {**about, "type": stored.kind, "bytes": stored.data.nbytes, "max_abs_err": stored.error, "because": stored.because}


def _vector(value: Tensor) -> Stored:
    return Stored("F32", value.detach().float().cpu().contiguous().numpy().view(np.uint8), 0.0)


def _vocabulary(writer: Any, tokenizer: Any, rows: int) -> str | None:
    if tokenizer is not None:
        return vocabulary.describe(writer, tokenizer, rows)
    writer.add_tokenizer_model("none")
    return None


def _type(kind: str) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[kind]


def _most(rows: list[dict[str, Any]]) -> int:
    """GGUF's number of the type that most bytes are in."""
    from gguf import LlamaFileType

    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row["type"]] = sizes.get(row["type"], 0) + row["bytes"]
    kind = max(sizes, key=lambda key: sizes[key])
    return int(LlamaFileType.ALL_F32 if kind == "F32" else LlamaFileType[f"MOSTLY_{kind}"])


def _zeros(rows: list[dict[str, Any]]) -> float:
    sizes = [(round(row["density"] * (every := math.prod(row["shape"]))), every) for row in rows if len(row["shape"]) == 2]
    total = sum(every for _, every in sizes)
    return (total - sum(kept for kept, _ in sizes)) / total
