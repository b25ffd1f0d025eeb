"""A safetensors file written tensor by tensor: the bytes of `safetensors.torch.save_file`, with one tensor in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadInput

# In the format's own order; a file holds the last of them first.
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
ALIGNMENT = 8


def write_tensors(path: Path, kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], read: Callable[[str], Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write the tensors of these dtypes and shapes; `read(name)` is asked for one after the other.

    Raises BadInput where what is read is not of the dtype and shape that was announced, or the format has no such dtype.

    >>> import tempfile
    >>> from safetensors.torch import save
    >>> tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.zeros(2, 2)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(Path(folder) / "x", {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.__getitem__)
    ...     (Path(folder) / "x").read_bytes() == save(tensors)
    True
    """
    for name, (dtype, _) in kinds.items():
        if dtype not in DTYPES:
            raise BadInput(f"{name} of dtype {dtype}", f"a safetensors file holds {', '.join(DTYPES.values())}", "load the model in another dtype")
    rank = list(DTYPES).index
    order = sorted(kinds, key=lambda name: (-rank(kinds[name][0]), name))
    with path.open("wb") as file:
        file.write(_header(order, kinds, metadata))
        for name in order:
            tensor = read(name)
            if (tensor.dtype, tuple(tensor.shape)) != kinds[name]:
                raise BadInput(f"{name} is {tensor.dtype} {tuple(tensor.shape)}", f"{kinds[name][0]} {kinds[name][1]} was announced")
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _header(order: list[str], kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name in order:
        dtype, shape = kinds[name]
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
