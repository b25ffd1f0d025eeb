"""What runs a model's decoding: our native code, or transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rarefy.core.discover import pick
from rarefy.core.errors import BadInput, Refused
from rarefy.kernels.library import describe


def _native(model: Any) -> str:
    from rarefy.hub.decoder import use_decoder

    use_decoder(model)
    return f"rarefy, {describe()}"


def _transformers(model: Any) -> str:
    return "transformers"


def _auto(model: Any) -> str:
    try:
        return _native(model)
    except (BadInput, Refused) as reason:
        return f"transformers ({reason.value}: {reason.rule})"


ENGINES: dict[str, Callable[[Any], str]] = {"auto": _auto, "native": _native, "transformers": _transformers}


def use_engine(model: Any, name: str = "auto") -> str:
    """Let `name` run the model's decoding, in place; what it is, for a record.

    auto: native where the model and this install allow it, else transformers, and the reason is in the answer.

    Raises:
        BadInput: no such engine, or (native) a model that the native code does not compute.
        Refused: (native) without native kernels.
    """
    return pick(ENGINES, name, "engine")(model)
