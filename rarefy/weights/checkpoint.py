"""Finished groups of sites on disk, so that a prune that was killed goes on to the same bytes.

A group is a block of the chain, the sites outside it, or the whole model: one safetensors file with the new weights
as the model stores them, the packed masks, and the site records as JSON in its header, so that the three cannot disagree.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rarefy.core.errors import BadFile, DiskError, Refused
from rarefy.core.files import DRAFT, no_room, write_atomic

try:
    import fcntl
except ModuleNotFoundError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

KEY = "key.json"


class Checkpoint:
    """A folder of finished groups under one key.

    Args:
        folder: made when it is locked, or when the first group is finished.
        replace: delete a checkpoint under another key instead of refusing it.
        on_resume: called with (finished, groups) once, where there is something to go on from.

    Raises:
        Refused: the folder belongs to another job or to a run that is alive, or is no checkpoint, or cannot be written.
        BadFile: a file in it is truncated or was changed.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "half.partial"
    >>> Checkpoint(folder).open("job").put("block 0", {"weight:a": torch.ones(2)}, [{"name": "a", "kept": 2}])
    >>> tensors, records = Checkpoint(folder).open("job").get("block 0")
    >>> tensors["weight:a"].tolist(), records
    ([1.0, 1.0], [{'name': 'a', 'kept': 2}])
    """

    def __init__(self, folder: str | Path, *, replace: bool = False, on_resume: Callable[[int, int], None] | None = None) -> None:
        self.folder, self.replace, self.on_resume = Path(folder), replace, on_resume
        self.key = ""
        self.finished: tuple[int, int] = (0, 0)  # groups, of how many
        self._owner: dict[str, str] = {}  # tensor -> label of its group
        self._locks = 0

    @contextmanager
    def locked(self) -> Iterator[Checkpoint]:
        """Nobody else may use the folder while this is entered; the system lifts the lock of a run that was killed."""
        if fcntl is None or self._locks:
            yield self
            return
        handle = self._lock()
        self._locks += 1
        try:
            yield self
        finally:
            self._locks -= 1
            if self.folder.is_dir() and all(p.name == KEY for p in self.folder.iterdir()):  # nothing was finished: nothing to keep
                (self.folder / KEY).unlink(missing_ok=True)
                self.folder.rmdir()
            os.close(handle)

    def _lock(self) -> int:
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.folder, os.O_RDONLY)
            except OSError as error:
                raise self._unwritable(error) from error
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(handle)
                raise Refused(f"checkpoint {self.folder} is in use", "another run writes the same output now", "wait until it has finished, or name another folder") from error
            except OSError:
                return handle  # a file system without locks
            if self.folder.is_dir() and os.path.samestat(os.fstat(handle), self.folder.stat()):
                return handle
            os.close(handle)  # its owner finished and removed it between our two calls

    def open(self, key: str) -> Checkpoint:
        """Take the folder for the job that `key` names."""
        self.key = key
        if not self.folder.exists():
            return self
        if not self.folder.is_dir() or (not (self.folder / KEY).is_file() and not all(DRAFT in p.name for p in self.folder.iterdir())):
            raise Refused(f"{self.folder} is no checkpoint", "nothing is overwritten unasked", "move it away or name another folder")
        if (self.folder / KEY).is_file() and self._stored() != key:
            if not self.replace:
                raise Refused(
                    f"checkpoint {self.folder} belongs to another run",
                    "model, method, options, text, seed, threads and torch version must be as they were",
                    "delete it or pass --force",
                )
            self._clear()
        return self

    def expect(self, labels: Iterable[str]) -> None:
        """Tell how far an earlier run came through the groups of these labels."""
        known = [self.has(label) for label in labels]
        self.finished = (sum(known), len(known))
        if any(known) and self.on_resume:
            self.on_resume(sum(known), len(known))

    def has(self, label: str) -> bool:
        return self._path(label).is_file()

    def get(self, label: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
        """The tensors and records of a finished group, or None."""
        path = self._path(label)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                header, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise self._damaged(path) from error
        if header.get("digest") != digest(header.get("records", ""), tensors):
            raise self._damaged(path)
        self._owner.update(dict.fromkeys(tensors, label))
        return tensors, json.loads(header["records"])

    def holds(self, name: str) -> bool:
        """Whether a group that this run has put or got has a tensor of that name."""
        return name in self._owner

    def tensor(self, name: str) -> Tensor:
        """One tensor of a group that this run has put or got."""
        path = self._path(self._owner[name])
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise self._damaged(path) from error

    def put(self, label: str, tensors: Mapping[str, Tensor], records: list[dict[str, Any]]) -> None:
        """Keep a finished group; it is on the disk, whole, when this returns."""
        text = json.dumps(records)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / KEY).is_file():
                write_atomic(self.folder / KEY, json.dumps({"key": self.key}).encode())
            write_atomic(self._path(label), save(dict(tensors), {"records": text, "digest": digest(text, dict(tensors))}))
        except OSError as error:
            raise self._unwritable(error) from error
        self._owner.update(dict.fromkeys(tensors, label))
        self.finished = (self.finished[0] + 1, self.finished[1])

    def remove(self) -> None:
        """Delete the checkpoint; anything that is none stays."""
        if (self.folder / KEY).is_file():
            self._clear()
            self.folder.rmdir()

    def _clear(self) -> None:
        for path in sorted(self.folder.iterdir(), key=lambda p: p.name == KEY):  # the key last: what is left is known as a checkpoint
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _path(self, label: str) -> Path:
        return self.folder / f"{hashlib.sha256(label.encode()).hexdigest()[:16]}.safetensors"

    def _stored(self) -> str:
        path = self.folder / KEY
        try:
            return str(json.loads(path.read_text())["key"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(path) from error

    def _unwritable(self, error: OSError) -> DiskError:
        return DiskError(f"checkpoint {self.folder} cannot be written", no_room(error) or str(error.strerror), "free some space or name another folder")

    def _damaged(self, path: Path) -> BadFile:
        return BadFile(f"checkpoint file {path}", "it is truncated or was changed", f"delete {path.parent} and begin again")


def digest(*values: Any) -> str:
    """sha256 over nested mappings, sequences, tensors (dtype, device, shape, bytes) and the repr of anything else.

    >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(2)}), digest(torch.zeros(2)) == digest(torch.zeros(2, 1))
    (True, False)
    """
    state = hashlib.sha256()
    _feed(state, values)
    return state.hexdigest()


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        state.update(f"T{value.dtype}{value.device.type}{list(value.shape)}".encode())
        state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        state.update(f"M{len(value)}".encode())
        for key in sorted(value, key=str):
            _feed(state, str(key))
            _feed(state, value[key])
    elif isinstance(value, (list, tuple)):
        state.update(f"L{len(value)}".encode())
        for item in value:
            _feed(state, item)
    else:
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
        state.update(f"R{len(text)}:{text}".encode())


def pack(mask: Tensor) -> Tensor:
    """A bool mask of any shape as uint8 [ceil(n / 8)], first entry in the highest bit.

    >>> pack(torch.tensor([[True, False, True]])).tolist()
    [160]
    """
    return torch.from_numpy(numpy.packbits(mask.detach().cpu().reshape(-1).numpy()))


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool mask of that shape.

    >>> unpack(torch.tensor([160], dtype=torch.uint8), (1, 3)).tolist()
    [[True, False, True]]
    """
    count = int(numpy.prod(shape))
    return torch.from_numpy(numpy.unpackbits(packed.numpy(), count=count).astype(bool)).reshape(shape)
