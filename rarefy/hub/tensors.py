"""What a folder's safetensors files hold, read with our own eyes: names once, inside the folder, and a sha256 each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rarefy.core.errors import BadFile

INDEX = "model.safetensors.index.json"
_AGAIN = "download or write it again"
_LONGEST = 100_000_000  # bytes of a header, as safetensors has it


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


def hashes(files: Iterable[Path]) -> dict[str, str]:
    """{tensor: sha256 of its bytes} over safetensors files.

    Raises:
        BadFile: a file is truncated or no safetensors file, or a name occurs twice.
    """
    found: dict[str, str] = {}
    for file in sorted(files):
        for name, sha in _file(file).items():
            if name in found:
                raise BadFile(file.name, f"it holds the tensor {name[:80]!r}, which another file holds too", _AGAIN)
            found[name] = sha
    return found


def _file(file: Path) -> dict[str, str]:
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LONGEST):
            raise BadFile(file.name, "it is truncated or no safetensors file", _AGAIN)
        header = read_json(handle.read(length), file.name)
        found = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = _offsets(entry, name, file)
            if not 0 <= begin <= end <= size - 8 - length:
                raise BadFile(file.name, f"tensor {name[:80]!r} lies outside of it, so it is truncated or tampered with", _AGAIN)
            handle.seek(8 + length + begin)
            found[name] = _sha(handle, end - begin)
    return found


def _offsets(entry: Any, name: str, file: Path) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise BadFile(file.name, f"tensor {name[:80]!r} has no data_offsets", _AGAIN)
    return offsets[0], offsets[1]


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
