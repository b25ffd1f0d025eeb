"""The records that flow between parts: small frozen dataclasses and plain tensors.

Axis legend: R routed rows, E experts, N assignments, k experts per row, O output rows, I input columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Paper:
    """Where a method comes from and how ours differs. `slug` is a row of the catalogue or a baseline's own name."""

    slug: str
    title: str
    reference: str
    deviations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """One matrix that may become sparse. `key` is the state-dict key of the tensor that holds it.

    `axes` brings the tensor (or, for a fused expert tensor, the slice of `expert`) to [O, ..., I]: output axis
    first, input axis last. A Linear is (0, 1), a transformers Conv1D (1, 0), a Conv2d (0, 2, 3, 1).
    """

    key: str
    module: str
    param: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] = (0, 1)
    expert: int | None = None
    role: str = "linear"

    @property
    def name(self) -> str:
        """The key, with the expert's index for a slice of a fused tensor: unique among sites."""
        return self.key if self.expert is None else f"{self.key}[{self.expert}]"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self, tensor: Tensor) -> Tensor:
        """The site's weight as a view [O, ..., I] of the tensor under `key`."""
        return (tensor if self.expert is None else tensor[self.expert]).permute(self.axes)

    def write(self, tensor: Tensor, value: Tensor) -> None:
        """Copy `value` [O, ..., I] back into the tensor under `key`."""
        self.read(tensor).copy_(value)


@dataclass(frozen=True)
class Member:
    """How unit i of a `Units` covers one axis of one site: axis[start : start + tile*n*block] seen as [tile, n, block]."""

    site: str
    axis: int | None = None  # None: elementwise
    tile: int = 1
    block: int = 1
    start: int = 0


@dataclass(frozen=True)
class Units:
    """One index space over one or several tensors; what an allocation counts and a mask ranges over."""

    name: str
    shape: tuple[int, ...]
    members: tuple[Member, ...]
    floor: int = 0
    cap: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def limit(self) -> int:
        return self.numel if self.cap is None else self.cap

    def expand(self, mask: Tensor, member: Member, like: Tensor) -> Tensor:
        """The mask over units as a bool mask over the member's tensor."""
        if member.axis is None:
            return mask
        n = self.shape[0]
        row = mask.view(1, n, 1).expand(member.tile, n, member.block).reshape(-1)
        full = torch.ones(like.shape[member.axis], dtype=torch.bool, device=like.device)
        full[member.start : member.start + row.numel()] = row
        return full.view([-1 if i == member.axis else 1 for i in range(like.dim())]).expand_as(like)


@dataclass(frozen=True)
class Entries:
    """The stored entries of a sparse tensor: values [nnz], flat sorted index [nnz], dense shape."""

    values: Tensor
    index: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Delta:
    """A rewiring: flat positions to drop and to grow, and the values grown entries start with (None: by policy)."""

    drop: Tensor
    grow: Tensor
    fill: Tensor | None = None


@dataclass(frozen=True)
class StatePolicy:
    """What becomes of weights and optimizer state where entries are dropped and grown."""

    drop_weight: str = "zero"  # zero | keep
    drop_state: str = "zero"  # zero | keep
    grow_weight: str = "zero"  # zero | keep | fill
    grow_state: str = "zero"  # zero | keep
    at: str = "before"  # before the optimizer step | instead of it


@dataclass(frozen=True)
class Pruned:
    """What a solver returns for one site: weight (exactly zero where the mask is False), mask, new bias or None.

    `notes` is what the record should say about the site (damping used, error on the solver's own objective): plain JSON values.
    """

    weight: Tensor
    mask: Tensor
    bias: Tensor | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    kind: str
    step: int
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Where training is. `counts` holds how many events of each kind were seen."""

    step: int = 0
    total: int = 1
    phase: int = 0
    phase_step: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def fraction(self) -> float:
        return min(1.0, self.step / max(1, self.total))


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own parts. `until` is a number of steps or a Trigger; None lasts to the end."""

    name: str = "train"
    until: Any = None
    density: Any = None  # Schedule -> fraction kept
    knobs: Mapping[str, Any] = field(default_factory=dict)  # name -> Schedule, written to views before the forward
    criterion: Any = None
    allocation: Any = None
    pattern: Any = None
    rewiring: Any = None
    fraction: Any = None  # Schedule -> fraction of the stored entries that a rewiring replaces
    every: int = 100
    rate: Any = None  # Schedule -> factor on the optimizer's own learning rate; None leaves the rate alone
    penalties: tuple[Any, ...] = ()
    objective: Any = None
    trainable: Callable[[str], bool] | None = None
    enter: tuple[Callable[[Any], None], ...] = ()
    enforce: bool = True  # weights outside the mask are zeroed after every step


@dataclass(frozen=True)
class Recipe:
    """A once-method as a value: solver, allocation, pattern. `paper` where the combination itself is published."""

    name: str
    solver: Any
    allocation: Any
    pattern: Any
    paper: Paper | None = None


@dataclass(frozen=True)
class TrainRecipe:
    """A training method as a value: `phases(density, steps)` gives the tuple of phases."""

    name: str
    phases: Callable[[float, int], tuple[Phase, ...]]
    allocation: Any
    criterion: Any
    paper: Paper | None = None


@dataclass(frozen=True)
class Gating:
    """Activation gates as a value: {which places: which gate of a density}, and how one density is shared over the places."""

    name: str
    parts: tuple[tuple[Any, Callable[[float], Any]], ...]
    sharing: Any
    density: float = 0.5
    paper: Paper | None = None


@dataclass(frozen=True)
class Context:
    """What a router may need besides x. Row-aligned tensors lead with R; `live` [E] marks routable experts."""

    ids: Tensor | None = None
    valid: Tensor | None = None  # False = padding
    owner: Tensor | None = None
    positions: Tensor | None = None
    labels: Tensor | None = None
    live: Tensor | None = None
    cache: Any = None
    routing: Any = None
    training: bool = False


@dataclass(frozen=True)
class Scores:
    """A router's opinion: logits [R, E] that balance losses see; `select` [R, E] is what is ranked where that differs."""

    logits: Tensor
    select: Tensor | None = None
    noise: Tensor | None = None
    probe: Tensor | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Routing:
    """A sparse assignment in canonical COO, unsorted.

    expert [N] (E = nobody, which keeps shapes static), weight [N] (differentiable, any normalisation),
    item [N] or None for row-major [R, k], rank [N] or None (0 = first choice), dropped [E] assignments lost so far.
    """

    expert: Tensor
    weight: Tensor
    items: int
    experts: int
    k: int | None = None
    item: Tensor | None = None
    rank: Tensor | None = None
    scores: Scores | None = None
    dropped: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self) -> Tensor:
        """The item of every assignment, [N]."""
        if self.item is not None:
            return self.item
        assert self.k is not None
        return torch.arange(self.items, device=self.expert.device).repeat_interleave(self.k)

    def ranks(self) -> Tensor:
        """The rank of every assignment, [N]."""
        if self.rank is not None:
            return self.rank
        if self.k is None:
            return torch.zeros_like(self.expert)
        return torch.arange(self.k, device=self.expert.device).repeat(self.items)

    def counts(self) -> Tensor:
        """How many rows each expert gets, [E]; the sentinel is not counted."""
        return self.count(torch.ones_like(self.expert))

    def count(self, chosen: Tensor) -> Tensor:
        """How many of the assignments where `chosen` [N] is 1 or True go to each expert, [E]; shapes stay static, for the compiler."""
        zeros = torch.zeros(self.experts + 1, dtype=torch.long, device=self.expert.device)
        return zeros.scatter_add(0, self.expert, chosen.long())[: self.experts]


@dataclass(frozen=True)
class Rows:
    """What a bank is given: x [R, ...] UNGATHERED, and per assignment (sorted by expert) item, expert, weight, rank; offsets [E] are inclusive ends."""

    x: Tensor
    item: Tensor
    expert: Tensor
    weight: Tensor
    offsets: Tensor
    rank: Tensor | None = None
    probe: Tensor | None = None
    context: Context = field(default_factory=Context)


@dataclass(frozen=True)
class Slots:
    """Soft routing over S slots per expert: dispatch and combine [G, M, E, S], a token's share in a slot and a slot's share in a token."""

    dispatch: Tensor
    combine: Tensor


@dataclass(frozen=True)
class Mix:
    """Routing in weight space: group g runs one expert, whose parameters are ``sum_k weight[g, k] W_expert[g, k]``.

    weight [G, k] and expert [G, k]; `routing` of the G groups is what balance losses see, where there are some.
    """

    weight: Tensor
    expert: Tensor
    routing: Routing | None = None


@dataclass(frozen=True)
class Entry:
    """What a Trace saw of one layer call."""

    path: str
    call: int
    layer: Any
    routing: Routing
    context: Context
    x: Tensor | None = None


Key = int | tuple[int, int]  # how a cache calls an expert: its index, or (layer, index) in a cache over layers


@dataclass(frozen=True)
class Access:
    """What a cache did for one use of an expert: found it, or loaded it, with `left` making room (None where there was room)."""

    key: Key
    loaded: bool = False
    left: Key | None = None
