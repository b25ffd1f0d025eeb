"""rarefy makes neural networks sparse and makes the zeros pay.

The verbs and the records, loaded when first used::

    import rarefy
    report = rarefy.prune(model, batches, rarefy.recipes()["wanda"], density=0.5)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rarefy.hub import lazy as _lazy

if TYPE_CHECKING:
    from rarefy.activations.attach import attach_gates as attach_gates
    from rarefy.core.ambient import Ambient as Ambient
    from rarefy.core.discover import load_plugin as load_plugin
    from rarefy.core.discover import methods as methods
    from rarefy.core.discover import recipes as recipes
    from rarefy.core.errors import RarefyError as RarefyError
    from rarefy.core.records import Paper as Paper
    from rarefy.core.records import Phase as Phase
    from rarefy.core.records import Recipe as Recipe
    from rarefy.core.records import Routing as Routing
    from rarefy.core.records import Site as Site
    from rarefy.core.records import TrainRecipe as TrainRecipe
    from rarefy.core.search import Bisect as Bisect
    from rarefy.core.trace import Trace as Trace
    from rarefy.hub.load import load as load
    from rarefy.probes.perplexity import perplexity as perplexity
    from rarefy.surgery.heal import heal as heal
    from rarefy.weights.formats import set_formats as set_formats
    from rarefy.weights.masks import apply_masks as apply_masks
    from rarefy.weights.masks import from_torch_prune as from_torch_prune
    from rarefy.weights.optimize import optimize as optimize
    from rarefy.weights.prune import prune as prune
    from rarefy.weights.sites import find_sites as find_sites
    from rarefy.weights.sparsifier import Sparsifier as Sparsifier
    from rarefy.weights.train import train as train

__version__ = "0.1.0"
_lazy.install()

_WHERE = {
    "attach_gates": "activations.attach",
    "Ambient": "core.ambient",
    "load_plugin": "core.discover",
    "methods": "core.discover",
    "recipes": "core.discover",
    "RarefyError": "core.errors",
    "Paper": "core.records",
    "Phase": "core.records",
    "Recipe": "core.records",
    "Routing": "core.records",
    "Site": "core.records",
    "TrainRecipe": "core.records",
    "Bisect": "core.search",
    "Trace": "core.trace",
    "load": "hub.load",
    "perplexity": "probes.perplexity",
    "heal": "surgery.heal",
    "optimize": "weights.optimize",
    "prune": "weights.prune",
    "find_sites": "weights.sites",
    "set_formats": "weights.formats",
    "apply_masks": "weights.masks",
    "from_torch_prune": "weights.masks",
    "Sparsifier": "weights.sparsifier",
    "train": "weights.train",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'rarefy' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"rarefy.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
