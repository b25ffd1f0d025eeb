"""`python -m rarefy` and `rarefy`: the command line, whose imports take seconds in which Ctrl-C is one line too."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def run() -> None:
    """The console script."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # `nohup` and shells in scripts ignore it
    if ours:
        signal.signal(signal.SIGINT, _stop)  # an exception would be lost in, or reworded by, an extension that is being imported
    import rarefy.cli.verbs
    from rarefy.cli.main import main

    assert rarefy.cli.verbs is not None
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"error: interrupted before anything was begun\n")
    os._exit(130)


if __name__ == "__main__":
    run()
