"""`rarefy`: the entry point. Errors are one line on standard error and an exit code that means something."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any

import typer

from rarefy.core.discover import load_plugin
from rarefy.core.errors import RarefyError
from rarefy.core.files import no_room

_INTERRUPTED = 130
_CLOSED = (errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)
_NAMED = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)

app = typer.Typer(
    name="rarefy",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Make neural networks sparse, and measure what it cost.",
)


def _version(asked: bool) -> None:
    if asked:
        from rarefy.cli.kernels import version

        typer.echo(version())
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Versions, and whether native kernels compute here.")] = False,
    plugin: Annotated[list[str] | None, typer.Option(help="A Python file with parts of your own; may be repeated.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads for torch; default: all cores.", min=1)] = None,
) -> None:
    for file in plugin or ():
        load_plugin(file)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code is returned by the console script."""
    try:
        import rarefy.cli.verbs

        assert rarefy.cli.verbs is not None
        code: Any = app(args=argv, standalone_mode=False)
        sys.stdout.flush()  # a reader that is gone shows here, not at exit
        if code == _INTERRUPTED:  # typer makes a code of Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except RarefyError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing half-written was left, run the same command again", _INTERRUPTED)
    except BrokenPipeError:
        return _unread()
    except SystemExit as stop:  # rich and typer make an exit of it
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        return _unread()
    except OSError as error:
        remedy = _remedy(error)
        if remedy is None:
            raise
        return _fail(f"{error.filename or 'a file'}: {error.strerror}; nothing half-written was left, {remedy}.", 6)
    except typer.Exit as stop:
        return int(stop.exit_code)
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        return _fail(f"{usage().rstrip('.')}; see {_help(error)}.", getattr(error, "exit_code", 2))


def _remedy(error: OSError) -> str | None:
    """What helps against an error of the disk; None where it is none."""
    if no_room(error) is not None:
        return "free some space"
    if error.errno in _CLOSED:
        return "name a place that you may write to"
    return "check the path" if error.errno in _NAMED else None


def _help(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    verb = getattr(context, "info_name", None) if getattr(context, "parent", None) is not None else None
    return f"rarefy {verb} --help" if verb else "rarefy --help"


def _unread() -> int:
    """The reader had enough, as with `| head`: nothing went wrong, and the rest goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code
