"""Our dispatch of rows to gated experts against transformers' experts implementations, on the same weights and routings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from rarefy.core.errors import BadInput, MissingExtra
from rarefy.core.records import Routing
from rarefy.experts.banks.glu import GLU
from rarefy.experts.dispatch import dispatch
from rarefy.probes.bench import MEMORY, Contestant, Product, Work, cache_bytes, checked, conditions, figures, interleaved

Peer = Callable[[GLU, "Routed"], Product]


@dataclass(frozen=True)
class Sizes:
    """A layer of E gated experts of inner width I on rows of `width`, each of which gets k.

    >>> Sizes.parse("64:8:512:256")
    Sizes(experts=64, k=8, width=512, inner=256)
    """

    experts: int
    k: int
    width: int
    inner: int

    def __post_init__(self) -> None:
        if not (1 <= self.k <= self.experts and self.width > 0 and self.inner > 0):
            raise BadInput(f"{self!r}", "a row takes between one and all of the experts, and widths are above 0", "choose k in 1..E")

    @classmethod
    def parse(cls, text: str) -> Sizes:
        parts = text.split(":")
        if len(parts) != 4 or not all(part.isdigit() for part in parts):
            raise BadInput(f"experts {text!r}", "a layer is EXPERTS:K:WIDTH:INNER", "pass for example 64:8:512:256")
        return cls(*map(int, parts))

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's float32 weights."""
        return 3 * 4 * self.width * self.inner

    def bank(self, seed: int) -> GLU:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GLU(self.experts, self.width, self.inner).requires_grad_(False)


@dataclass(frozen=True)
class Routed:
    """The experts of T rows [T, k], best first, and their weights [T, k]."""

    expert: Tensor
    weight: Tensor

    @classmethod
    def drawn(cls, sizes: Sizes, tokens: int, seed: int) -> Routed:
        """Each row's k highest of E normal logits, weighed by the softmax over those."""
        top, expert = torch.randn(tokens, sizes.experts, generator=Generator().manual_seed(seed)).topk(sizes.k, -1)
        return cls(expert, top.softmax(-1))

    def exact(self, x: Tensor, bank: GLU) -> Tensor:
        """What every implementation is to compute, in float64: ``y_t = sum_k w_tk down_e (silu(gate_e x_t) * up_e x_t)``."""
        y = torch.zeros(x.shape, dtype=torch.double)
        for e in self.expert.unique().tolist():
            here = self.expert == e
            rows = here.any(1)
            gate, up = (x[rows].double() @ bank.gate_up_proj[e].double().T).chunk(2, -1)
            y[rows] += (self.weight * here).sum(1)[rows, None] * ((gate * gate.sigmoid() * up) @ bank.down_proj[e].double().T)
        return y


def _ours(bank: GLU, routed: Routed) -> Product:
    (tokens, k), expert, weight = routed.expert.shape, routed.expert.flatten(), routed.weight.flatten()
    return lambda x: dispatch(x, Routing(expert, weight, tokens, bank.experts, k), bank)


def _transformers(implementation: str, bank: GLU, routed: Routed) -> Product:
    """Qwen3's experts, which hold their weights as ours do, by one of transformers' implementations."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as absent:
        raise MissingExtra("transformers", "hub") from absent
    _, width, inner = bank.down_proj.shape
    config = Qwen3MoeConfig(hidden_size=width, moe_intermediate_size=inner, num_experts=bank.experts, hidden_act="silu")
    config._experts_implementation = implementation
    with torch.device("meta"):
        module: Any = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = bank.gate_up_proj, bank.down_proj
    return lambda x: module(x, routed.expert, routed.weight)


EXPERTS_PEERS: dict[str, Peer] = {
    "transformers-eager": lambda bank, routed: _transformers("eager", bank, routed),
    "transformers-grouped_mm": lambda bank, routed: _transformers("grouped_mm", bank, routed),
}


@torch.no_grad()
def bench_experts(
    layers: Sequence[Sizes],
    tokens: Sequence[int],
    peers: Sequence[str] = tuple(EXPERTS_PEERS),
    *,
    rounds: int = 7,
    seed: int = 0,
    memory: int = MEMORY,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[dict[str, Any]]:
    """Time a layer's experts, routed already, by our dispatch and beside it by every peer; no gradients.

    Calls go through as many routings, and banks, as read the largest cache's size twice, within the memory; all contestants share them.

    Returns:
        [{op: "experts", experts, k, width, inner, tokens, dtype, peer, ratio, ratio_min, ratio_max, ours_us, peer_us, max_abs_err,
        gb_per_s, roofline, threads, isa, torch, warning}]: as `rarefy.probes.bench.bench`; gb_per_s counts the weights of every expert
        that some row gets, once, so that a back end which reads them more often shows a low one.

    Raises:
        BadInput: an unknown peer, fewer than 5 rounds, no tokens.
        MissingExtra: no transformers.
    """
    checked(rounds, ())
    unknown = [name for name in peers if name not in EXPERTS_PEERS]
    if unknown or not all(count > 0 for count in tokens):
        raise BadInput(f"peers {unknown}" if unknown else f"tokens {list(tokens)}", f"known are {', '.join(EXPERTS_PEERS)}" if unknown else "every count is above 0")
    rows: list[dict[str, Any]] = []
    for number, sizes in enumerate(layers):
        banks = [sizes.bank(seed + copy) for copy in range(_copies(sizes.experts * sizes.expert_bytes, memory))]
        for count in tokens:
            if progress:
                progress(number, len(layers), f"{sizes.experts} experts, {count} tokens")
            rows += _case(sizes, banks, count, peers, rounds, seed)
    return rows


def _copies(size: int, memory: int) -> int:
    return max(1, min(memory // size, math.ceil(2 * cache_bytes() / size)))


def _case(sizes: Sizes, banks: Sequence[GLU], tokens: int, peers: Sequence[str], rounds: int, seed: int) -> Iterator[dict[str, Any]]:
    x = torch.randn(tokens, sizes.width, generator=Generator().manual_seed(seed + 1))
    first = Routed.drawn(sizes, tokens, seed + 2)
    read = int(first.expert.unique().numel()) * sizes.expert_bytes
    routed = [first, *(Routed.drawn(sizes, tokens, seed + 2 + number) for number in range(1, max(len(banks), min(256, math.ceil(2 * cache_bytes() / read)))))]
    places = [(banks[number % len(banks)], each) for number, each in enumerate(routed)]
    made = {name: Contestant([make(*place) for place in places], read) for name, make in {"": _ours, **{name: EXPERTS_PEERS[name] for name in peers}}.items()}
    errors = {name: _error(each, x, places) for name, each in made.items()}
    right = {name: error <= 1e-5 * largest for name, (error, largest) in errors.items()}
    seconds = interleaved({name: each for name, each in made.items() if right[name]}, x, rounds) if right[""] else {}
    work = Work(read, 4 * 2 * x.numel(), tokens * sizes.k * 3 * sizes.width * sizes.inner)
    cached = len(banks) * sizes.experts * sizes.expert_bytes < cache_bytes()
    head = {"op": "experts", "experts": sizes.experts, "k": sizes.k, "width": sizes.width, "inner": sizes.inner, "tokens": tokens, "dtype": "float32"}
    for name in peers:
        end = {"max_abs_err": errors[""][0], **conditions(cached, right[""] and right[name])}
        yield {**head, "peer": name, **figures(seconds.get(""), seconds.get(name), work), **end}


def _error(contestant: Contestant, x: Tensor, places: Sequence[tuple[GLU, Routed]]) -> tuple[float, float]:
    """The largest absolute error against float64, and the largest value, over the first place and the last."""
    found = [(contestant.copies[at](x).double(), places[at][1].exact(x, places[at][0])) for at in {0, len(places) - 1}]
    return max(float((y - want).abs().max()) for y, want in found), min(float(want.abs().max()) for _, want in found)
