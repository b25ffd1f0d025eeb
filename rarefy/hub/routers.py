"""Foreign routers as ours: what a Hugging Face router returns <-> a `Routing`, known by its structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from rarefy.core.ambient import Seat, aligned
from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Context, Routing, Scores
from rarefy.core.trace import Tap
from rarefy.hub.experts import IMPLEMENTATION, is_experts

_TAP, _SEAT = "rarefy_tap", "rarefy_seat"
Rule = Callable[[Routing, Context], Routing]


class Form(Protocol):
    """One way in which routers answer: recognise it, read it as a Routing, write a Routing back."""

    def matches(self, out: Any, experts: int) -> bool: ...

    def read(self, out: Any, experts: int) -> Routing: ...

    def write(self, out: Any, routing: Routing, sentinel: bool) -> Any: ...


@dataclass(frozen=True)
class LogitsWeightsIndex:
    """(logits [T, E], weights [T, k], index [T, k]): Mixtral, Qwen, GPT-OSS, DeepSeek, GLM, OLMoE, Granite, Ernie, Phi, LFM2 and others."""

    def matches(self, out: Any, experts: int) -> bool:
        if not (isinstance(out, tuple) and len(out) == 3 and all(isinstance(t, Tensor) and t.dim() == 2 for t in out)):
            return False
        logits, weight, index = out
        return logits.shape[1] == experts and weight.shape == index.shape and index.shape[0] == logits.shape[0] and not index.is_floating_point()

    def read(self, out: Any, experts: int) -> Routing:
        logits, weight, index = out
        return Routing(index.reshape(-1), weight.reshape(-1), index.shape[0], experts, index.shape[1], scores=Scores(logits))

    def write(self, out: Any, routing: Routing, sentinel: bool) -> Any:
        logits, weight, index = out
        k = routing.k or 0
        nobody = routing.expert >= routing.experts
        expert, given = routing.expert, routing.weight.to(weight.dtype)
        if not sentinel:  # the host would index with E: some expert runs, and counts for nothing
            expert, given = expert.masked_fill(nobody, 0), given.masked_fill(nobody, 0.0)
        return logits, given.reshape(routing.items, k), expert.reshape(routing.items, k).to(index.dtype)


FORMS: tuple[Form, ...] = (LogitsWeightsIndex(),)


@dataclass(frozen=True)
class _Adapter:
    """The forward hook of one router. A bound method of it is what the router holds, so that copies of the model stay whole."""

    experts: nn.Module
    rule: Rule | None

    def hook(self, router: Any, args: tuple[Any, ...], out: Any) -> Any:
        count = int(self.experts.num_experts)  # type: ignore[arg-type]
        form = next((f for f in FORMS if f.matches(out, count)), None)
        if form is None:
            raise BadInput(f"{type(router).__name__} returning {_shape(out)}", f"an adapter reads {', '.join(type(f).__name__ for f in FORMS)}", "add a form to rarefy.hub.routers")
        rows = args[0].reshape(-1, args[0].shape[-1])
        context = replace(aligned(getattr(router, _SEAT)(), rows.shape[0]), training=router.training)
        chosen = form.read(out, count)
        routing = getattr(router, _TAP)(self._ruled(chosen, context), context, rows)
        if routing is chosen:
            return None
        return form.write(out, _fitting(routing, chosen), self.experts.config._experts_implementation == IMPLEMENTATION)  # type: ignore[union-attr]

    def _ruled(self, chosen: Routing, context: Context) -> Routing:
        if context.live is not None:
            raise Refused("live experts for a foreign router", "it has chosen before it can be told", "choose again in the rule given to adapt")
        routing = context.routing if isinstance(context.routing, Routing) else chosen
        return routing if self.rule is None else self.rule(routing, context)


def adapt(model: nn.Module, rule: Rule | None = None) -> nn.Module:
    """Let every router of a Hugging Face mixture of experts be seen, and ruled, as one of ours; returns the model.

    Each router gets a `Tap` and a `Seat` (no state): `Trace(model)` then yields an Entry per call under the router's path,
    `Ambient.attach(model)` gives it padding, and ``rule`` (Routing, Context) -> Routing (an Overflow such as Capacity, or
    any function) decides what the model's experts get. Without a rule the outputs keep their bits. What goes to nobody
    counts for nothing, and costs nothing where `use_experts` is on too. Call it before torch.compile; `unadapt` undoes it.

    Raises:
        BadInput: no router beside experts of transformers' kind; at the call, a router that answers in no known form, or a
            rule's Routing that does not fit the model.
        Refused: the model is adapted already; live experts, which a foreign router cannot heed.

    >>> import torch
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> from rarefy.core.trace import Trace
    >>> from rarefy.experts.overflow.capacity import Capacity
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    >>> model = adapt(MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2)), Capacity(0.5))
    >>> with Trace(model) as trace:
    ...     _ = model(torch.arange(4)[None])
    >>> entry = trace.entries[0]  # two of two experts for each of four tokens, half of them served
    >>> entry.path, entry.routing.counts().tolist(), entry.routing.dropped.tolist()
    ('model.layers.0.mlp.gate', [2, 2], [2, 2])
    """
    found = list(routers(model))
    if not found:
        raise BadInput(type(model).__name__, "it has no router beside experts of transformers' kind", "pass a mixture-of-experts model such as Mixtral")
    if any(hasattr(router, _TAP) for _, router, _ in found):
        raise Refused(f"adapting {type(model).__name__} twice", "its routers have an adapter", "call unadapt first")
    for _, router, experts in found:
        router.add_module(_TAP, Tap())
        router.add_module(_SEAT, Seat())
        router.register_forward_hook(_Adapter(experts, rule).hook)
    return model


def unadapt(model: nn.Module) -> nn.Module:
    """Take the adapters off again; returns the model."""
    for _, router, _ in routers(model):
        for handle, hook in list(router._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), _Adapter):
                del router._forward_hooks[handle]
        for name in (_TAP, _SEAT):
            router._modules.pop(name, None)
    return model


def routers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(path, router, experts) of every block that holds both: the router is the sibling with a parameter of E rows, one per expert."""
    for path, block in model.named_modules():
        experts = next((child for child in block.children() if is_experts(child)), None)
        if experts is None:
            continue
        for name, child in block.named_children():
            if child is not experts and _rates(child, int(experts.num_experts)):
                yield f"{path}.{name}".lstrip("."), child, experts


def _rates(module: nn.Module, experts: int) -> bool:
    """Whether exactly one of its matrices has a row per expert; a bare Linear beside experts is a shared expert's gate."""
    matrices = [p for p in module.parameters() if p.dim() == 2 and p.shape[0] == experts]
    return len(matrices) == 1 and type(module) is not nn.Linear


def _fitting(routing: Routing, chosen: Routing) -> Routing:
    """The routing, where the host can take it: k assignments per row, row-major, over the same rows and experts."""
    if routing.item is not None or routing.k is None or (routing.items, routing.experts) != (chosen.items, chosen.experts):
        shape = f"{routing.items} rows, {routing.experts} experts, {routing.k} per row"
        raise BadInput(
            f"a routing of {shape}", f"the host takes {chosen.items} rows, {chosen.experts} experts, k per row in row-major order", "return such a Routing from the rule"
        )
    return routing


def _shape(out: Any) -> str:
    parts = out if isinstance(out, tuple) else (out,)
    return str([list(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in parts])
