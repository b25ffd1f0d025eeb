"""What a folder's safetensors files hold, read with our own eyes: names once, inside the folder, and a sha256 each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadFile

INDEX = "model.safetensors.index.json"
_AGAIN = "download or write it again"
_LONGEST = 100_000_000  # bytes of a header, as safetensors has it


_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: safetensors' name of its dtype, its shape, sha256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @staticmethod
    def of(tensor: Tensor) -> Stored:
        """What a live tensor would be stored as."""
        return Stored(_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), digest(tensor))

    def seal(self) -> str:
        """One sha256 of dtype, shape and bytes: of the text ``F32 16,27 <sha256 of the bytes>``."""
        return hashlib.sha256(f"{self.dtype} {','.join(map(str, self.shape))} {self.sha256}".encode()).hexdigest()


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes in row order."""
    raw = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256((raw if raw.dtype == torch.uint8 else raw.view(torch.uint8)).numpy().data).hexdigest()


def read_json(text: bytes, name: str) -> Any:
    """Parse JSON; a key that occurs twice is refused, since readers differ in which one they take."""
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, name))
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile(name, "it is not JSON", _AGAIN) from error


def _once(pairs: list[tuple[str, Any]], name: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in [k for k, _ in pairs[:i]])
        raise BadFile(name, f"it holds the key {twice[:80]!r} twice", _AGAIN)
    return found


def stored(files: Iterable[Path]) -> dict[str, Stored]:
    """{name: tensor} over safetensors files, every byte read.

    Raises:
        BadFile: a file is truncated or no safetensors file, or a name occurs twice.
    """
    return _over(files, read=True)


def headers(files: Iterable[Path]) -> dict[str, Stored]:
    """As `stored`, with the checksums left empty: only the headers are read."""
    return _over(files, read=False)


def _over(files: Iterable[Path], read: bool) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file in sorted(files):
        for name, tensor in _file(file, read).items():
            if name in found:
                raise BadFile(file.name, f"it holds the tensor {name[:80]!r}, which another file holds too", _AGAIN)
            found[name] = tensor
    return found


def _file(file: Path, read: bool) -> dict[str, Stored]:
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LONGEST):
            raise BadFile(file.name, "it is truncated or no safetensors file", _AGAIN)
        header = read_json(handle.read(length), file.name)
        if not isinstance(header, dict):
            raise BadFile(file.name, "its header names no tensors", _AGAIN)
        found = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, begin, end = _entry(entry, name, file)
            if not 0 <= begin <= end <= size - 8 - length:
                raise BadFile(file.name, f"tensor {name[:80]!r} lies outside of it, so it is truncated or tampered with", _AGAIN)
            handle.seek(8 + length + begin)
            found[name] = Stored(dtype, shape, _sha(handle, end - begin) if read else "")
    return found


def _entry(entry: Any, name: str, file: Path) -> tuple[str, tuple[int, ...], int, int]:
    dtype, shape, offsets = (entry.get(k) if isinstance(entry, dict) else None for k in ("dtype", "shape", "data_offsets"))
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in [*shape, *offsets])
    if not lists or not isinstance(dtype, str):
        raise BadFile(file.name, f"tensor {name[:80]!r} has no dtype, shape and data_offsets", _AGAIN)
    return dtype, tuple(shape or ()), offsets[0], offsets[1]  # type: ignore[index]


def _sha(handle: Any, count: int) -> str:
    sha = hashlib.sha256()
    while count:
        chunk = handle.read(min(count, 1 << 22))
        if not chunk:
            break
        sha.update(chunk)
        count -= len(chunk)
    return sha.hexdigest()


def check_folder(folder: Path) -> None:
    """Raise BadFile where config or index hold a key twice, or the index names a file outside the folder."""
    for name in ("config.json", INDEX):
        if (folder / name).is_file():
            read = read_json((folder / name).read_bytes(), name)
            for shard in _shards(read) if name == INDEX else ():
                if shard != Path(shard).name or not shard.endswith(".safetensors"):
                    raise BadFile(name, f"it names the file {shard[:80]!r}, which is not a safetensors file of this folder", _AGAIN)


def _shards(index: Any) -> set[str]:
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise BadFile(INDEX, "it holds no weight_map of file names", _AGAIN)
    return set(names.values())
