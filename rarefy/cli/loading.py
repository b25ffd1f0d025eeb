"""Loading for the command line: the bars of the library below are for a terminal only."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from rarefy.cli.output import err, megabytes
from rarefy.core.errors import Refused
from rarefy.hub import load as hub
from rarefy.hub.atomic import check_target
from rarefy.hub.packed import Packed
from rarefy.hub.shards import ShardedWeights, available_bytes, folder_bytes, load_sharded
from rarefy.hub.text import WINDOW


def load(spec: str, **options: Any) -> hub.Loaded:
    """`rarefy.hub.load.load`, quiet in a pipe."""
    quiet()
    return hub.load(spec, **options)


def load_or_stream(spec: str, stream: bool | None, **options: Any) -> tuple[hub.Loaded, ShardedWeights | None]:
    """The model in memory, or its weights left in their files: as asked, or (None) where the folder is larger than memory."""
    size, memory = folder_bytes(spec), available_bytes()
    if stream is None and memory is not None and size > memory:
        err.print(f"{megabytes(size)} of weights and {megabytes(memory)} of memory: the weights are streamed", highlight=False, soft_wrap=True)
        stream = True
    if not stream:
        return load(spec, **options), None
    quiet()
    return load_sharded(spec, **options)


def check_out(out: str | Path, *models: str | None, force: bool) -> None:
    """Refused: writing `out` would replace a folder unasked (`rarefy.hub.atomic.check_target`), or one of the models that are read."""
    whole = Path(out).absolute().resolve()
    for model in models:
        source = Path(model or "").expanduser()
        if model and source.exists() and source.resolve().is_relative_to(whole):
            raise Refused(f"--out {out}", f"the model {model} lies there and would be replaced", "name another folder")
    check_target(Path(out), force=force)


def window(loaded: hub.Loaded) -> int:
    """Tokens of a calibration or scoring window: `WINDOW`, or fewer where the model has fewer positions."""
    return min(WINDOW, getattr(loaded.model.config, "max_position_embeddings", None) or WINDOW)


def need_plain(loaded: hub.Loaded) -> None:
    """Refused: the model is packed, so that there is no plain weight to work on."""
    if any(isinstance(module, Packed) for module in loaded.model.modules()):
        raise Refused(f"{loaded.spec} is packed", "this verb works on plain weights", f"run rarefy unpack {loaded.spec} --out DIR first, and name DIR")


def quiet() -> None:
    """The libraries below draw no bars and say little where no terminal is."""
    try:
        from transformers import modeling_gguf_pytorch_utils as gguf
        from transformers.utils import logging
    except ModuleNotFoundError:
        return  # loading raises with the extra to install
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        vars(gguf)["tqdm"] = partial(tqdm, disable=True)  # this bar asks no logger
