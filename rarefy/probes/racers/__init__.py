"""What runs a model in a race, each way in a file of its own: our engine, transformers, torch's int4 kernel, llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rarefy.core.discover import pick
from rarefy.probes.racers import hosted, llama_cpp
from rarefy.probes.racers.racer import Died, Racer

ENGINES: dict[str, Callable[[str, str | None], Racer]] = {
    "native": hosted.native,
    "transformers": hosted.eager,
    "compiled": hosted.compiled,
    "torch-int4": hosted.torch_int4,
    "torch-int4-compiled": hosted.torch_int4_compiled,
    "llama.cpp": llama_cpp.racer,
}


def racer(spec: str) -> Racer:
    """The racer of `MODEL`, `MODEL@ENGINE` or `MODEL@native+HEAD`; native where nothing is said.

    >>> racer("demo@abacus")
    Traceback (most recent call last):
    rarefy.core.errors.BadInput: engine 'abacus': known are native, transformers, compiled, torch-int4, torch-int4-compiled, llama.cpp.

    Raises:
        BadInput: an unknown engine, a head for an engine that keeps the model's own, or a model that the engine does not run.
    """
    model, _, engine = spec.partition("@")
    name, _, head = engine.partition("+")
    return pick(ENGINES, name or "native", "engine")(model, head or None)


def racers(specs: Iterable[str], lost: Callable[[str], None]) -> list[Racer]:
    """A racer for each text, as `racer` reads it, without those whose engine dies here; `lost` is told of each in one sentence.

    Raises:
        Died: the first of them, where fewer than two are left.
    """
    found: list[Racer] = []
    dead: list[Died] = []
    for spec in specs:
        try:
            found.append(racer(spec))
        except Died as error:
            dead.append(error)
    if dead and len(found) < 2:
        raise dead[0]
    for death in dead:
        lost(str(death))
    return found


__all__ = ["ENGINES", "Died", "Racer", "racer", "racers"]
