"""A file appears whole under its name, or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

DRAFT = ".tmp-"  # in the name of a file whose writer was killed


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file by way of a draft beside it: whole also after a power cut, and without a draft after an error.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomic(Path(folder) / "a", b"x")
    ...     [f.name for f in Path(folder).iterdir()]
    ['a']
    """
    draft = path.with_name(f".{path.name}{DRAFT}{os.getpid()}")
    try:
        with draft.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(draft, path)
    except OSError as error:
        error.filename = str(path)  # a full disk names no file, and the draft's name is ours
        raise
    finally:
        with suppress(OSError):  # the error above says more
            draft.unlink()
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
