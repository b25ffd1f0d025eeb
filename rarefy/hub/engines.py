"""What runs a model's decoding: our native code, or transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rarefy.core.discover import pick
from rarefy.core.errors import BadInput, Refused
from rarefy.kernels.library import describe
from rarefy.layouts import LAYOUTS


def _native(model: Any, head: str | None) -> str:
    from rarefy.hub.decoder import use_decoder

    use_decoder(model, head)
    copied = model.rarefy_copied_bytes
    copies = f", {str(model.dtype).removeprefix('torch.')} weights copied to float32: {copied / 1e6:.1f} MB more" if copied else ""
    return f"rarefy, {describe()}{'' if head is None else f', head {head}'}{copies}"


def _transformers(model: Any, head: str | None) -> str:
    if head is not None:
        raise BadInput(f"head {head!r} with transformers", "only the native engine stores the head otherwise", "leave it out, or take engine native")
    return "transformers"


def _auto(model: Any, head: str | None) -> str:
    try:
        return _native(model, head)
    except (BadInput, Refused) as reason:
        return f"transformers ({reason.value}: {reason.rule})"


ENGINES: dict[str, Callable[[Any, str | None], str]] = {"auto": _auto, "native": _native, "transformers": _transformers}


def use_engine(model: Any, name: str = "auto", head: str | None = None) -> str:
    """Let `name` run the model's decoding, in place; what it is, for a record.

    auto: native where the model and this install allow it, else transformers, and the reason is in the answer. `head`: see
    `rarefy.hub.decoder.use_decoder`.

    Raises:
        BadInput: no such engine, or (native) a model that the native code does not compute.
        Refused: (native) without native kernels.
    """
    if head is not None:
        pick(LAYOUTS, head, "layout")
    return pick(ENGINES, name, "engine")(model, head)
