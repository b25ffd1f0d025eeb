"""What is worth computing once: converted models, in one folder that `rarefy cache` lists and clears."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from rarefy.core.errors import BadInput
from rarefy.hub.atomic import atomic_folder

RECORD = "rarefy_cache.json"


@dataclass(frozen=True)
class Cached:
    """One entry: its name, its folder, its size in bytes, and what it was made from."""

    name: str
    path: Path
    bytes: int
    made_from: Mapping[str, Any] = field(default_factory=dict)


def cache_dir() -> Path:
    """$RAREFY_CACHE, else $XDG_CACHE_HOME/rarefy, else ~/.cache/rarefy; not created."""
    own = os.environ.get("RAREFY_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "rarefy"


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def list_cache() -> tuple[Cached, ...]:
    """Every whole entry, by name."""
    root = cache_dir()
    folders = sorted(p.parent for p in root.glob(f"*/{RECORD}")) if root.is_dir() else []
    return tuple(Cached(p.name, p, folder_bytes(p), _record(p).get("made_from", {})) for p in folders if not p.name.startswith("."))


def cache_size() -> int:
    """Bytes under the cache folder, unfinished drafts included."""
    root = cache_dir()
    return folder_bytes(root) if root.is_dir() else 0


def clear_cache(name: str | None = None) -> int:
    """Remove one entry, or all entries and drafts; the bytes freed. Files that are not the cache's stay. Raises BadInput for an unknown name."""
    entries = {entry.name: entry for entry in list_cache()}
    if name is not None and name not in entries:
        raise BadInput(f"{name!r}", "is not in the cache", "rarefy cache lists what is")
    before = cache_size()
    for entry in entries.values() if name is None else (entries[name],):
        with _lock(entry.path):
            shutil.rmtree(entry.path)
    if name is None:
        _remove_drafts(".*.tmp-*")
    return before - cache_size()


def cached_folder(name: str, make: Callable[[Path], None], made_from: Mapping[str, Any]) -> Path:
    """The folder of an entry, made at most once: `make` fills an empty folder, under a lock between processes.

    An entry whose files no longer have the sizes they were written with is made again.
    """
    path = cache_dir() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        if _whole(path):
            return path
        _remove_drafts(f".{name}.tmp-*")  # of a process that died: we hold its lock
        shutil.rmtree(path, ignore_errors=True)
        with atomic_folder(path) as draft:
            make(draft)
            record = {"made_from": dict(made_from), "sizes": _sizes(draft)}
            (draft / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True))
    return path


def _lock(path: Path) -> FileLock:
    return FileLock(str(path.parent / f".{path.name}.lock"))


def _remove_drafts(pattern: str) -> None:
    for draft in cache_dir().glob(pattern):
        shutil.rmtree(draft, ignore_errors=True)


def _sizes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != RECORD}


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _whole(folder: Path) -> bool:
    return folder.is_dir() and "sizes" in (record := _record(folder)) and record["sizes"] == _sizes(folder)
