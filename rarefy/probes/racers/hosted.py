"""Models of transformers: decoded by our native code, by transformers as it is, compiled, or over torch's int4 kernel."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import BadInput
from rarefy.hub.engines import use_engine
from rarefy.hub.load import Loaded, load, parameters_bytes
from rarefy.hub.packed import Packed
from rarefy.layouts import LAYOUTS
from rarefy.probes.racers.racer import Racer
from rarefy.probes.racers.torch_int4 import Int4Linear, use_torch_int4

COMPILED, INT4 = ("compiled", "static cache"), "torch's int4 kernel"
POSITIONS = 512  # of a static cache: each attention reads them all
Caches = Callable[[Any], Any]  # config -> what the first call is given as past_key_values


class Hosted:
    """A causal LM of transformers whose cached forwards are timed and scored."""

    def __init__(self, name: str, loaded: Loaded, engine: str, head: str | None = None, cache: Caches = lambda config: None) -> None:
        model = loaded.model
        self.name, self.model, self.engine, self.cache = name, model, engine, cache
        self.tokenizer, self.vocabulary = loaded.tokenizer, model.config.vocab_size
        self.precision = ", ".join([_precision(model), *_ends(model), *([] if head is None else [f"head {head}"])])
        self.density = _density(model)
        self.model_bytes = parameters_bytes(model)

    @torch.no_grad()
    def time(self, prompt: Tensor, tokens: int) -> float:
        step = _Steps(self)
        following = step(prompt)[:, -1:].argmax(-1)
        began = time.perf_counter()
        for _ in range(tokens):
            following = step(following)[:, -1:].argmax(-1)
        return (time.perf_counter() - began) / tokens

    @torch.no_grad()
    def nll(self, windows: Sequence[Tensor]) -> list[Tensor]:
        logits = (_Steps(self)(window[None])[0, :-1].double() for window in windows)
        return [-scores.log_softmax(-1).gather(1, window[1:, None])[:, 0] for window, scores in zip(windows, logits, strict=True)]


class _Steps:
    """One sequence through the model, its cache carried from call to call."""

    def __init__(self, racer: Hosted) -> None:
        self.model, self.past, self.seen = racer.model, racer.cache(racer.model.config), 0

    def __call__(self, ids: Tensor) -> Tensor:
        at = torch.arange(self.seen, self.seen + ids.shape[1])
        self.seen += ids.shape[1]
        out = self.model(ids, past_key_values=self.past, use_cache=True, **({} if self.past is None else {"position_ids": at[None]}))
        self.past = out.past_key_values
        logits: Tensor = out.logits
        return logits


def hosted(name: str, loaded: Loaded, engine: str = "native", head: str | None = None) -> Hosted:
    """A loaded model as `use_engine` runs it."""
    return Hosted(name, loaded, use_engine(loaded.model, engine, head), head)


def native(spec: str, head: str | None) -> Racer:
    return hosted(_called(spec), load(spec), "native", head)


def _plain(spec: str, head: str | None, prepare: Callable[[Any], Any], *words: str) -> Hosted:
    """The model under transformers, its layers as `prepare` leaves them."""
    from transformers import __version__

    if head is not None:
        raise BadInput(f"head {head!r}", "only the native engine stores the head otherwise than the model", "leave +LAYOUT out, or take @native")
    loaded = load(spec)
    prepare(loaded.model)
    return Hosted(_called(spec), loaded, ", ".join([f"transformers {__version__}", *words]))


def _compiled(racer: Hosted) -> Racer:
    from transformers import StaticCache

    racer.cache = lambda config: StaticCache(config=config, max_cache_len=POSITIONS)
    racer.model.forward = torch.compile(racer.model.forward, dynamic=False)
    return racer


def _as_it_is(model: Any) -> None:
    pass


def eager(spec: str, head: str | None) -> Racer:
    return _plain(spec, head, _as_it_is, "eager")


def compiled(spec: str, head: str | None) -> Racer:
    return _compiled(_plain(spec, head, _as_it_is, *COMPILED))


def torch_int4(spec: str, head: str | None) -> Racer:
    return _plain(spec, head, use_torch_int4, "eager", INT4)


def torch_int4_compiled(spec: str, head: str | None) -> Racer:
    return _compiled(_plain(spec, head, use_torch_int4, *COMPILED, INT4))


def _called(spec: str) -> str:
    return os.path.basename(os.path.normpath(spec))


def _precision(model: Any) -> str:
    """How most of the blocks' weights are stored."""
    kinds: Counter[str] = Counter()
    for module in _matrices(model):
        kinds[_stored_as(module)] += module.in_features * module.out_features
    return max(kinds, key=lambda kind: kinds[kind]) if kinds else "none"


def _ends(model: Any) -> Iterator[str]:
    embedding = model.get_input_embeddings()
    if isinstance(embedding, Packed):
        yield f"embeddings {embedding.layer.layout}"


def _stored_as(module: Any) -> str:
    if isinstance(module, Int4Linear):
        return "int4"
    if isinstance(module, Packed):
        return module.layer.dtype if LAYOUTS[module.layer.layout].lossless else module.layer.layout.partition("-")[0]
    return str(module.weight.dtype).removeprefix("torch.")


def _density(model: Any) -> float:
    kept = every = 0
    for module in _matrices(model):
        weights = module.in_features * module.out_features
        kept += weights if isinstance(module, Int4Linear) else int(torch.count_nonzero(module.dense() if isinstance(module, Packed) else module.weight))
        every += weights
    return kept / every if every else 1.0


def _matrices(model: Any) -> Iterator[Any]:
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, (nn.Linear, Packed, Int4Linear)) and module is not head and module is not model.get_input_embeddings():
            yield module
