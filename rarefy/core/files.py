"""A file appears whole under its name, or not at all."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from pathlib import Path

DRAFT = ".tmp-"  # in the name of a file whose writer was killed

_NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "a file of it is larger than this system's limit"}
_NUMBER = re.compile(r"\(os error (\d+)\)")


def no_room(error: BaseException) -> str | None:
    """Why an error means that there is no room on the disk, or None where it means something else.

    >>> no_room(OSError(28, "No space left on device")), no_room(RuntimeError("I/O error: File too large (os error 27)")), no_room(OSError(2, "No such file"))
    ('the disk is full', "a file of it is larger than this system's limit", None)
    """
    named = _NUMBER.search(str(error))  # safetensors wraps the operating system's error in its own, the number only in the text
    number = int(named[1]) if named else getattr(error, "errno", None)
    return _NO_ROOM.get(number) if number is not None else None


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
