"""Loading for the command line: the bars of the library below are for a terminal only."""

from __future__ import annotations

import sys
from typing import Any

from rarefy.hub import load as hub


def load(spec: str, **options: Any) -> hub.Loaded:
    """`rarefy.hub.load.load`, quiet in a pipe."""
    try:
        from transformers.utils import logging
    except ModuleNotFoundError:
        return hub.load(spec, **options)  # raises with the extra to install
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    return hub.load(spec, **options)
