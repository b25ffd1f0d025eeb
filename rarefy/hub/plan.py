"""The plan in config.json: which modules are packed, and how to prove each one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadFile
from rarefy.layouts import LAYOUTS

METHOD = "rarefy"
VERSION = 1
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LARGEST = 2**31


@dataclass(frozen=True)
class Layer:
    """One packed matrix: layout, [out, in], dtype of its values, sha256 and length of its bytes."""

    layout: str
    shape: tuple[int, int]
    dtype: str
    sha256: str
    bytes: int

    @staticmethod
    def of(weight: Tensor, packed: Tensor, layout: str) -> Layer:
        return Layer(layout, (weight.shape[0], weight.shape[1]), str(weight.dtype).removeprefix("torch."), digest(packed), packed.numel())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}

    def verify(self, packed: Tensor, name: str) -> None:
        """Raise BadFile unless length, checksum and bit count are those of the plan."""
        if packed.numel() != self.bytes:
            raise BadFile(f"packed tensor {name}", f"it has {packed.numel()} bytes where the plan says {self.bytes}", "the file is damaged; write it again")
        if digest(packed) != self.sha256:
            raise BadFile(f"packed tensor {name}", "its sha256 is not the plan's", "the file is damaged; download or write it again")
        LAYOUTS[self.layout].check(packed, self.shape, DTYPES[self.dtype], name)


def digest(packed: Tensor) -> str:
    return hashlib.sha256(packed.detach().cpu().contiguous().numpy().data).hexdigest()


def parse(version: Any, layers: Any) -> dict[str, Layer]:
    """The layers of a plan, every field checked. Raises BadFile."""
    if version != VERSION or isinstance(version, bool):
        raise BadFile(f"packed format version {version!r}", f"this rarefy reads version {VERSION}", "upgrade rarefy")
    if not isinstance(layers, Mapping):
        raise BadFile("the plan in config.json", "its layers must be a mapping of module paths", "write the folder again")
    return {str(path): _layer(str(path), entry) for path, entry in layers.items()}


def _layer(path: str, entry: Any) -> Layer:
    again = "write the folder again"
    if not isinstance(entry, Mapping) or set(entry) != {"layout", "shape", "dtype", "sha256", "bytes"}:
        raise BadFile(f"the plan of {path}", "it must hold exactly layout, shape, dtype, sha256 and bytes", again)
    layout, shape, dtype, sha, count = (entry[k] for k in ("layout", "shape", "dtype", "sha256", "bytes"))
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise BadFile(f"layout {layout!r} of {path}", f"known layouts are {', '.join(LAYOUTS)}", "upgrade rarefy")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadFile(f"dtype {dtype!r} of {path}", f"known dtypes are {', '.join(DTYPES)}", again)
    if not isinstance(shape, (list, tuple)) or len(shape) != 2 or not all(type(n) is int and 0 < n < _LARGEST for n in shape):
        raise BadFile(f"shape {shape!r} of {path}", "a shape is two positive integers", again)
    most = LAYOUTS[layout].size((shape[0], shape[1]), shape[0] * shape[1], DTYPES[dtype])
    if type(count) is not int or not 0 < count <= most:
        raise BadFile(f"bytes {count!r} of {path}", f"a packed {shape[0]} x {shape[1]} has at most {most} bytes", again)
    if not isinstance(sha, str) or re.fullmatch(r"[0-9a-f]{64}", sha) is None:
        raise BadFile(f"sha256 of {path}", "it must be 64 hexadecimal digits", again)
    return Layer(layout, (shape[0], shape[1]), dtype, sha, count)
