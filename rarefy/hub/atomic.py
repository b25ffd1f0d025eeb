"""A folder, or a large file, appears whole under its name or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rarefy.core.errors import DiskError, Refused
from rarefy.core.files import no_room


def check_target(out: Path, *, force: bool) -> None:
    """Refused where writing to `out` would lose something: a file, a folder with content (without `force`), a folder that is no model.

    `force` replaces a model folder (one with a config.json), never an arbitrary one.
    """
    if out.name in ("", ".."):
        raise Refused(f"--out {str(out)!r}", "what is written is a folder of its own, with a name", "name a new folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise Refused(f"{out} is a file", "a model is written to a folder", "name another folder")
    if not any(out.iterdir()):
        return
    if not force:
        raise Refused(f"{out} exists and is not empty", "nothing is overwritten unasked", "name another folder or pass --force")
    if not (out / "config.json").is_file():
        raise Refused(f"{out} holds no config.json", "--force replaces only a model folder", "name another folder")


@contextmanager
def atomic_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `out`; on success it becomes `out`, on any error it is removed and `out` is as before.

    Raises Refused as `check_target` does, and where the disk is full.
    """
    check_target(out, force=force)
    with _draft_folder(out) as draft:
        yield draft
        _sync(draft)
        draft.chmod(0o777 & ~_umask())
        check_target(out, force=force)  # another run may have been faster
        _swap(draft, out)


def check_file(out: Path, suffix: str, *, force: bool) -> None:
    """Refused where `out` is a folder, is named like something else than `suffix` says, or is there already (without `force`)."""
    if out.suffix != suffix:
        raise Refused(f"--out {str(out)!r}", f"what is written is a file whose name ends in {suffix}", f"name for example {out.stem or 'model'}{suffix}")
    if out.is_dir():
        raise Refused(f"{out} is a folder", "what is written is one file", "name a file")
    if out.exists() and not force:
        raise Refused(f"{out} exists", "nothing is overwritten unasked", "name another file or pass --force")


@contextmanager
def atomic_file(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield the path of a new file beside `out`; on success it becomes `out`, on any error it is removed and `out` is as before.

    Raises Refused as `check_file` does, and where the disk is full.
    """
    with _draft_folder(out) as folder:
        draft = folder / out.name
        yield draft
        _sync(folder)
        check_file(out, out.suffix, force=force)  # another run may have been faster
        os.replace(draft, out)


@contextmanager
def _draft_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that is gone afterwards, unless the body has moved it.

    Raises DiskError where it cannot be made, or where the body fails because there is no room.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
    except OSError as error:
        raise DiskError(f"{out} cannot be written", str(error.strerror), "name a folder you may write to") from error
    try:
        yield folder
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        why = no_room(error)
        if why is not None:
            free = shutil.disk_usage(out.parent).free
            raise DiskError(f"{out} was not written", f"{why} ({free / 1e3:,.0f} kB are free)", "free more or name another folder; nothing half-written was left") from error
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _swap(draft: Path, out: Path) -> None:
    if not out.exists() or not any(out.iterdir()):
        os.rename(draft, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    os.rename(out, old)
    try:
        os.rename(draft, out)
    except OSError:
        os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
