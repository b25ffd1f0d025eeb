"""What a verb that was stopped, by Ctrl-C or by a full disk, says about the work it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rarefy.core.errors import DiskError, RarefyError
from rarefy.core.files import no_room
from rarefy.weights.checkpoint import Checkpoint

NOTHING = "nothing was finished, nothing was kept"


class Interrupted(RarefyError):
    """Ctrl-C."""

    exit_code = 130


@contextmanager
def resumable(kept: Callable[[], str | None]) -> Iterator[None]:
    """Whoever is stopped inside is told what was kept: a sentence, or None for nothing."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted("interrupted", kept() or NOTHING, _again(kept())) from stop
    except DiskError as error:
        raise DiskError(error.value, error.rule, f"{error.remedy}; {kept() or NOTHING}; {_again(kept())}") from error
    except OSError as error:
        why = no_room(error)
        if why is None:
            raise
        raise DiskError(f"{error.filename or 'a file'} cannot be written", why, f"free some space; {kept() or NOTHING}; {_again(kept())}") from error


def _again(kept: str | None) -> str:
    return "the same command goes on from there" if kept else "the same command begins again"


def finished(checkpoint: Checkpoint, things: str) -> Callable[[], str | None]:
    """What a checkpoint keeps, for `resumable`; `things` is what it counts."""

    def kept() -> str | None:
        done, all_of_them = checkpoint.finished
        return f"{done} of {all_of_them} {things} are kept in {checkpoint.folder}" if done else None

    return kept
