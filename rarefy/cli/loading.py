"""Loading for the command line: the bars of the library below are for a terminal only."""

from __future__ import annotations

import sys
from typing import Any

from rarefy.cli.output import err, megabytes
from rarefy.hub import load as hub
from rarefy.hub.shards import ShardedWeights, available_bytes, folder_bytes, load_sharded


def load(spec: str, **options: Any) -> hub.Loaded:
    """`rarefy.hub.load.load`, quiet in a pipe."""
    _quiet()
    return hub.load(spec, **options)


def load_or_stream(spec: str, stream: bool | None, **options: Any) -> tuple[hub.Loaded, ShardedWeights | None]:
    """The model in memory, or its weights left in their files: as asked, or (None) where the folder is larger than memory."""
    size, memory = folder_bytes(spec), available_bytes()
    if stream is None and memory is not None and size > memory:
        err.print(f"{megabytes(size)} of weights and {megabytes(memory)} of memory: the weights are streamed", highlight=False)
        stream = True
    if not stream:
        return load(spec, **options), None
    _quiet()
    return load_sharded(spec, **options)


def _quiet() -> None:
    try:
        from transformers.utils import logging
    except ModuleNotFoundError:
        return  # loading raises with the extra to install
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
