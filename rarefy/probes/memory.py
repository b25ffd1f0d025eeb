"""What the process has held in memory at its peak."""

from __future__ import annotations

import resource
import sys


def peak_bytes() -> int:
    """The largest resident set of this process so far, in bytes: the system reports KiB, macOS bytes.

    >>> peak_bytes() > 1_000_000
    True
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
