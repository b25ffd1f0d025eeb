"""A matrix in one of GGUF's types: our own codes as they lie where GGUF has the same ones, else the smallest type that changes no value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.core.discover import pick
from rarefy.hub.packed import Packed
from rarefy.kernels.grouped.reference import GROUP
from rarefy.layouts import LAYOUTS
from rarefy.layouts.bits import unpack_bits

AUTO = "auto"
SAME: dict[str, str] = {"int4": "Q4_0", "int4-asymmetric": "Q4_1", "int8": "Q8_0"}  # {layout: the type of GGUF with the same codes}, smallest first
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "F16": lambda w: w.half(),
    "BF16": lambda w: w.bfloat16(),
    "F32": lambda w: w.float(),
}
TYPES = (AUTO, *(kind.lower() for kind in (*PLAIN, *SAME.values())))
HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Stored:
    """A matrix [O, I] as it is written: uint8 [O, bytes of a row], the type, the largest change of a weight, why it is no smaller or else than asked, or None."""

    kind: str
    data: np.ndarray[Any, Any]
    error: float
    because: str | None = None


def weight_of(module: Any) -> Tensor:
    """The weight [O, I] of a plain or packed layer in float32, which lossy layouts compute in whatever dtype they stand for."""
    if not isinstance(module, Packed):
        weight: Tensor = module.weight.detach()
        return weight.float().cpu()
    return LAYOUTS[module.layer.layout].unpack(module.weight.detach().cpu(), module.layer.shape, torch.float32)


def parse_type(text: str) -> str:
    """A member of `TYPES`, in any case of letters.

    >>> parse_type("Q8_0")
    'q8_0'

    Raises:
        BadInput: no such type.
    """
    return pick({name: name for name in TYPES}, text.lower(), "type")


def store(module: Any, weight: Tensor, wanted: str = AUTO) -> Stored:
    """The weight of a layer, as `weight_of` has it, in GGUF's bytes.

    ``int8``, ``int4`` and ``int4-asymmetric`` have the blocks of Q8_0, Q4_0 and Q4_1: a float16 scale, a float16 smallest value (Q4_1),
    the codes of 32 columns of a row. They are copied, a group that we leave out as one of zeros. Any other weight takes what is asked
    for; with `auto` the first of Q4_0, Q4_1, Q8_0, F16, BF16 and F32 that holds each of its values exactly.
    A width that is no multiple of 32 takes no blocks and is F16 where they were asked for.
    """
    kind, whole = wanted.upper(), weight.shape[1] % GROUP == 0
    layout = module.layer.layout if isinstance(module, Packed) else None
    narrow = None if whole else f"{weight.shape[1]} columns are no multiple of {GROUP}"
    if layout in SAME and whole:
        return _held(SAME[layout], _copied(LAYOUTS[layout].matrix(module.weight.detach().cpu(), module.layer.shape, torch.float32)), weight)
    if wanted == AUTO:
        return _exact(weight, narrow if layout in SAME else None)
    if kind not in PLAIN and narrow is not None:
        return _plain("F16", weight, narrow)
    return _plain(kind, weight) if kind in PLAIN else _held(kind, _quantised(weight, kind), weight)


def _exact(weight: Tensor, because: str | None) -> Stored:
    for found in _tried(weight):
        if found.error == 0:
            return Stored(found.kind, found.data, 0.0, because)
    return _plain("F32", weight, because)


def _tried(weight: Tensor) -> Iterator[Stored]:
    small = not bool((weight.abs() > HALF).any())
    if weight.shape[1] % GROUP == 0 and small:
        for layout, kind in SAME.items():
            codes = LAYOUTS[layout].matrix(LAYOUTS[layout].pack(weight), (weight.shape[0], weight.shape[1]), torch.float32)
            yield _held(kind, _copied(codes), weight)
    for kind in ("F16", "BF16") if small else ("BF16",):
        yield _plain(kind, weight)


def _plain(kind: str, weight: Tensor, because: str | None = None) -> Stored:
    if kind == "F16" and bool((weight.abs() > HALF).any()):
        kind, because = "F32", f"a magnitude above {HALF:.0f}, the largest of F16"
    made = PLAIN[kind](weight).contiguous()
    error = float((made.float() - weight).abs().max()) if weight.numel() else 0.0
    return Stored(kind, made.view(torch.uint8).numpy(), error, because)


def _copied(codes: Any) -> np.ndarray[Any, Any]:
    """The groups of a `GroupedMatrix`, row by row: scale, smallest value, codes; bytes [O, G * bytes of a block]."""
    groups = codes.columns // GROUP
    present = unpack_bits(codes.present, groups, "of groups")
    values = codes.codes ^ 128 if codes.bits == 8 else codes.codes  # ours count from the smallest, Q8_0 has a sign
    parts = [codes.scale[:, None].contiguous().view(torch.uint8), *([] if codes.zero is None else [codes.zero[:, None].contiguous().view(torch.uint8)]), values]
    blocks = torch.cat(parts, 1)
    full = torch.zeros(codes.rows, groups, blocks.shape[1], dtype=torch.uint8)
    full[present] = blocks
    return full.view(codes.rows, -1).numpy()


def _quantised(weight: Tensor, kind: str) -> np.ndarray[Any, Any]:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    made: np.ndarray[Any, Any] = quantize(weight.numpy(), GGMLQuantizationType[kind])
    return made


def _held(kind: str, data: np.ndarray[Any, Any], weight: Tensor) -> Stored:
    """With the error as gguf reads the bytes back."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    back = torch.from_numpy(dequantize(data, GGMLQuantizationType[kind]))
    return Stored(kind, data, float((back - weight).abs().max()) if weight.numel() else 0.0)
