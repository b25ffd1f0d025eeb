"""The base class of every role, its contract in one sentence.

A part is abstract or final: compose, do not override. Hyper-parameters make a part a frozen dataclass. The
keyword-only names of a role's method are what it asks for; `asks` reads them.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from rarefy.core.records import Access, Context, Delta, Entries, Entry, Key, Mix, Paper, Progress, Pruned, Routing, Scores, Site, Slots, Units


class Role(ABC):
    """A part with a name. `examples` are the instances that the contract suite runs."""

    name: ClassVar[str] = ""
    paper: ClassVar[Paper | None] = None

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(),)


def asks(method: Callable[..., Any]) -> tuple[str, ...]:
    """The keyword-only names of a method, `generator` aside: the statistics that it asks for.

    >>> asks(lambda weight, *, generator=None, input_norm: weight)
    ('input_norm',)
    """
    parameters = inspect.signature(method).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("generator", "bound", "pattern"))


class Statistic(Role):
    """A figure per site, streamed: `start`, one `update` per batch, `finish`. `name` is what parts ask for."""

    source: ClassVar[str] = "input"  # "input": rows [R, I] that the site saw; "gradient": dL/dweight [O, ..., I] of one batch

    @abstractmethod
    def start(self, weight: Tensor) -> dict[str, Tensor]: ...

    @abstractmethod
    def update(self, state: dict[str, Tensor], seen: Tensor) -> dict[str, Tensor]: ...

    @abstractmethod
    def finish(self, state: dict[str, Tensor]) -> Tensor: ...


class ModelStatistic(Role):
    """A figure per site that only the whole model can tell, a second derivative or a flow from end to end: collected at once, nothing changed.

    `collect` gives {site name: float32 [O, ..., I]}; `loss` is (model, batch) -> scalar.
    """

    source: ClassVar[str] = "model"

    @abstractmethod
    def collect(self, model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor]) -> dict[str, Tensor]: ...


class Criterion(Role):
    """Rate every weight of a site [O, ..., I]; larger means keep; a statistic is asked for by naming it keyword-only."""

    @abstractmethod
    def scores(self, weight: Tensor, *, generator: Generator | None = None, **stats: Tensor) -> Tensor: ...


class Allocation(Role):
    """Split one global budget over units, floors and caps respected, the total exact.

    May ask keyword-only for `scores` or `weights` ({units name: Tensor}) of the whole model, or for `generator`.
    """

    @abstractmethod
    def counts(self, units: Sequence[Units], budget: int, **asked: Any) -> dict[str, int]: ...


class Pattern(Role):
    """Scores [O, ..., I] and a count to a mask that obeys a structure with the nearest reachable count."""

    @abstractmethod
    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor: ...

    @abstractmethod
    def nearest(self, shape: Sequence[int], count: int) -> int:
        """The reachable count nearest to `count` (ties downwards); raises BadInput where the shape cannot carry the pattern."""

    @property
    def span(self) -> int:
        """How many neighbouring input columns are chosen together (1: any slice of columns may be masked by itself); 0: the whole matrix is."""
        return 0

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        """The pattern that a user's text names, or None where it names another."""
        return cls() if text == cls.name else None


class Solver(Role):
    """Prune a scope given its statistics: new weight, mask, bias; exactly zero where the mask is False.

    `needs` names the statistics; `solve` takes {site name: weight [O, ..., I]}, {site name: count} and
    stats {statistic: {site name: Tensor}}.
    """

    scope: ClassVar[str] = "matrix"  # matrix | block | model

    @property
    @abstractmethod
    def needs(self) -> tuple[str, ...]: ...

    @abstractmethod
    def solve(
        self,
        weights: Mapping[str, Tensor],
        budget: Mapping[str, int],
        *,
        stats: Mapping[str, Mapping[str, Tensor]],
        pattern: Pattern,
        bound: Mapping[str, Tensor] | None = None,
        generator: Generator | None = None,
    ) -> dict[str, Pruned]: ...


class Schedule(Role):
    """A pure function of progress: density, fraction, pattern, temperature, strength."""

    @abstractmethod
    def __call__(self, progress: Progress) -> Any: ...


class Trigger(Role):
    """Turns observations into the end of a phase; its state is explicit and checkpoints."""

    def state(self) -> dict[str, Any]:
        return {}

    @abstractmethod
    def observe(self, state: dict[str, Any], sparsifier: Any, event: Any) -> tuple[dict[str, Any], bool]: ...


class Rewiring(Role):
    """Stored entries of a matrix [O, ..., I] to a Delta; may ask keyword-only for `gradient` and `weight` (dense) and `final` (the model's last site)."""

    def short(self, mask: Tensor) -> int:
        """How many entries fewer than the count a mask [O, ..., I] that it made may have; most meet the count."""
        return 0

    @abstractmethod
    def rewire(self, entries: Entries, *, count: int, fraction: float, bound: Tensor | None, generator: Generator, **stats: Any) -> Delta: ...


class Penalty(Role):
    """One of five kinds, each a subclass in rarefy.weights.penalties: loss, gradient, proximal, dual, activation."""


class View(nn.Module):
    """The weight that the forward sees. Learned tensors live here, additive keys only; the raw weight is always an argument.

    `examples` are the instances that the contract suite runs, on a weight of shape (6, 8).
    """

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(),)

    def __init__(self) -> None:
        super().__init__()
        self.knobs: dict[str, Any] = {}

    def export(self, weight: Tensor) -> Pruned:
        value = self(weight).detach()
        return Pruned(value, value != 0)

    def extra_loss(self, weight: Tensor) -> Tensor | float:
        return 0.0

    def refresh(self, weight: Tensor, progress: Progress) -> None:
        """A closed-form update between steps; most views have none."""


class Affinity(nn.Module):
    """(x [R, d], context, bank) -> Scores. Learned; may read the bank. `examples` take rows of 8 and score 4 experts."""

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(8, 4),)


class MakesAffinity(Protocol):
    def __call__(self, width: int, experts: int, /) -> Affinity: ...


class MakesBank(Protocol):
    def __call__(self, experts: int, width: int, inner: int, /) -> Bank: ...


class Choice(Role):
    """(Scores, Context) -> Routing | Slots | Mix. Frozen; owns selection and weighing; `causal` is declared and tested.

    `affinity` (None: the linear router), `bank` (None: gated experts), `balances`, `overflow` and `controllers` are what its paper
    trains it with; a layer may take others.
    """

    affinity: ClassVar[MakesAffinity | None] = None
    bank: ClassVar[MakesBank | None] = None
    balances: ClassVar[tuple[Balance, ...]] = ()
    overflow: ClassVar[Overflow | None] = None
    controllers: ClassVar[tuple[Controller, ...]] = ()

    @abstractmethod
    def __call__(self, scores: Scores, context: Context) -> Routing: ...

    def shared(self, width: int, inner: int) -> nn.Module | None:
        """What serves every row beside the chosen experts, x [R, H] -> [R, H]; most choices have nothing."""
        return None

    def causal(self, training: bool) -> bool:
        """Whether a row's routing never depends on the rows after it, in training or outside it."""
        return True

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        """{what holds of every routing that it makes: whether it does}; the contract suite asks over many scores."""
        return {}


class Mixture(Role):
    """(Scores, Context) -> Slots | Mix over groups of tokens: nothing is chosen, everything takes part by its share.

    `affinity` makes a module (x [G, M, d], context) -> Scores, `before` one whose output is added to the tokens first (None: nothing);
    a context's `valid` is [G, M]. `bank` (None: gated experts) and `balances` are what its paper trains it with.
    """

    bank: ClassVar[MakesBank | None] = None
    balances: ClassVar[tuple[Balance, ...]] = ()

    @abstractmethod
    def affinity(self, width: int, experts: int, /) -> nn.Module: ...

    @abstractmethod
    def __call__(self, scores: Scores, context: Context) -> Slots | Mix: ...

    def before(self, width: int) -> nn.Module | None:
        return None

    def causal(self, training: bool) -> bool:
        """Whether what a token takes part in never depends on the tokens after it."""
        return False


class Layer(Role):
    """A routed layer that is more than one router over one bank, as a value: `make` gives its module.

    The module takes x [..., d], and a Context or the one of its `Ambient`, to [..., d]; padding comes out as zeros and changes nothing, and a
    `Trace` sees it by its `Tap`. `balances` and `controllers` are what its paper trains it with, `parts` the classes from other files that
    its evidence depends on.
    """

    balances: ClassVar[tuple[Balance, ...]] = ()
    controllers: ClassVar[tuple[Controller, ...]] = ()
    parts: ClassVar[tuple[type[Any], ...]] = ()

    @abstractmethod
    def make(self, width: int, experts: int, inner: int, /) -> nn.Module: ...

    def causal(self, training: bool) -> bool:
        """Whether what a row gets never depends on the rows after it."""
        return True


class Overflow(Role):
    """(Routing, Context) -> Routing within capacity; reports what it dropped."""

    @abstractmethod
    def __call__(self, routing: Routing, context: Context) -> Routing: ...

    def bound(self, routing: Routing, context: Context) -> int | None:
        """The most assignments that one expert keeps of this routing; None: as many as come."""
        raise NotImplementedError


class Balance(Role):
    """Entry -> scalar, run outside the layer; padding is masked."""

    @abstractmethod
    def __call__(self, entry: Entry) -> Tensor: ...

    def even(self, experts: int) -> float:
        """Its value where every one of so many live experts is equally likely and serves as many rows, one expert per row."""
        raise NotImplementedError


class Controller(Role):
    """What steers routed layers from step to step: besides the optimizer the only writer of their tensors, and of its own running state.

    `layers` are a model's routed layers by path, `entries` what they routed in training. The state is a dict of plain values (numbers,
    strings, lists, dicts) over all layers; `rarefy.core.control.Control` keeps it. `needs_rows`: entries come with their rows x.
    """

    needs_rows: ClassVar[bool] = False

    def start(self, layers: Mapping[str, Any]) -> dict[str, Any]:
        """The state before the first step; may write the layers' tensors in place."""
        return {}

    def resume(self, state: dict[str, Any], layers: Mapping[str, Any]) -> None:
        """Write anew what a state says of the layers and their state dict does not hold, as the choice that one routes by; most have nothing."""

    def loss(self, state: dict[str, Any], entries: Sequence[Entry]) -> Tensor | float:
        """What it adds to the loss of one forward; most add nothing."""
        return 0.0

    @abstractmethod
    def after_step(self, state: dict[str, Any], layers: Mapping[str, Any], entries: Sequence[Entry], optimizer: Optimizer) -> dict[str, Any]:
        """The state after a step, `entries` being all since the one before; may write in place the layers' tensors, and what the optimizer keeps of them."""


class Bank(nn.Module):
    """Functions [n, H] -> [n, H], one per expert, and one that takes a row's expert along; `grouped` may run all in one op. `examples` take rows of 8."""

    experts: int

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(4, 8, 6),)

    def split(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """One function [n, H] -> [n, H] per expert; n = 0 is fine."""
        raise NotImplementedError

    def each(self, x: Tensor, expert: Tensor) -> Tensor:
        """Row n [H] through expert[n]."""
        raise NotImplementedError


class Gate(nn.Module, Role):
    """The same activations x [..., C] with exact zeros: x where `keep(x)`, 0 elsewhere. Without arguments a gate is open.

    So is the gradient, unless the class is `straight`: then it passes everywhere. `stored` names the tensors that
    `settings` do not determine: they come from the files alone, where the plan seals them.
    """

    straight: ClassVar[bool] = False
    stored: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def keep(self, x: Tensor) -> Tensor:
        """Which entries stay: bool, the shape of `x`; NaN stays, so that it is seen."""

    @abstractmethod
    def settings(self) -> dict[str, float]:
        """The arguments that build this gate again; finite numbers."""

    @property
    def needs_rows(self) -> bool:
        """Whether it stays open until `calibrate` saw rows."""
        return False

    def calibrate(self, rows: Tensor) -> None:
        """Set what depends on the activations from rows [R, C]; most gates have nothing to set."""

    def around(self, run: Callable[..., Any], host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a host returns with this gate on its output, where `run(host, *args, **kwargs)` is what it returns without."""
        return self(run(host, *args, **kwargs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.keep(x), x, torch.zeros((), dtype=x.dtype, device=x.device))


class Places(Role):
    """Where a model is gated: the keys that `rarefy.core.attach.attach_gate` takes, found by watching one forward of a batch."""

    @abstractmethod
    def find(self, model: nn.Module, batch: Any) -> tuple[str, ...]: ...


class Sharing(Role):
    """One density over many places: {place: its own density}, with a mean over `sizes` (multiply-adds a token behind each place) that is the asked one."""

    @abstractmethod
    def densities(self, model: nn.Module, sizes: Mapping[str, int], density: float, batches: Sequence[Any]) -> dict[str, float]: ...


class Matrix(Protocol):
    """A stored matrix [O, I], ready to compute with; it keeps the tensors that it was made of, uncopied."""

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``y = x W^T + b``: x [..., I] -> y [..., O]."""

    def dense(self) -> Tensor:
        """The matrix [O, I]."""


@runtime_checkable
class Rows(Matrix, Protocol):
    """A matrix of which single rows can be read, as an embedding asks."""

    rows: int
    columns: int

    def take(self, ids: Tensor) -> Tensor:
        """Rows [..., I] of int64 ids [...] in [0, O)."""


class Layout(Role):
    """How a choice is stored: a matrix [O, I] as one-dimensional bytes, back, and computed with as it lies.

    `lossless`: every weight comes back bit for bit (a negative zero as a zero); else exact zeros do, and the others nearly.
    """

    lossless: ClassVar[bool]

    @abstractmethod
    def pack(self, weight: Tensor) -> Tensor:
        """uint8 [bytes], a multiple of 64."""

    @abstractmethod
    def size(self, shape: tuple[int, int], kept: int, dtype: torch.dtype) -> int:
        """The most bytes that a matrix of this shape with `kept` stored weights takes."""

    @abstractmethod
    def check(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
        """Raise BadFile unless these bytes are a matrix of that shape: nothing that `matrix` does may read past them."""

    @abstractmethod
    def matrix(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Matrix:
        """The matrix of bytes that `check` accepted; values of `dtype`."""

    def unpack(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The dense matrix [O, I] of `dtype`."""
        return self.matrix(packed, shape, dtype).dense().to(dtype)


class Selection(Role):
    """Which entries of a tensor stay, and how much of it must be seen before one can say: `passes` is streaming, blocking or materialising.

    streaming: by each value alone, so that the operator which makes the value can drop it; blocking: by `span`
    neighbouring columns of [rows, columns]; materialising: by the whole tensor, after the operator.
    """

    @property
    def passes(self) -> str:
        return "streaming"

    @property
    def span(self) -> int:
        return 1

    @abstractmethod
    def mask(self, values: Tensor, kept: Tensor | None = None) -> Tensor:
        """bool, the shape of `values`; `kept` is what stays already: of the same tensor before, or of the tensor whose gradient this is."""


class Policy(Role):
    """What leaves a full cache: sees records of what the cache did, and never changes a result.

    A frozen part; its running state is a plain dict (ints, strings, lists, dicts, tensors) that the cache keeps and
    checkpoints. A policy that needs the future carries it as `trace`, the keys of every use in order.
    """

    def state(self) -> dict[str, Any]:
        return {}

    @abstractmethod
    def observe(self, state: dict[str, Any], access: Access) -> dict[str, Any]:
        """The state after one use, found or loaded."""

    @abstractmethod
    def evict(self, state: dict[str, Any], resident: Sequence[Key], needed: Sequence[Key]) -> Key:
        """The one of `resident` that leaves for needed[0]; what follows in `needed` is used later in this call, in order, as far as known."""


class Task(Role):
    """A small training problem: model, a batch as a pure function of (seed, step), loss, evaluation."""

    @abstractmethod
    def model(self, seed: int, **options: Any) -> nn.Module: ...

    @abstractmethod
    def batch(self, seed: int, step: int) -> Any: ...

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]: ...

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """What trains it unless another is given."""
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)

    def sites(self, model: nn.Module) -> tuple[str, ...] | None:
        """The parameters that may become sparse; None: the weights of every Linear and Conv."""
        return None

    def controllers(self, model: nn.Module) -> tuple[Controller, ...]:
        """What acts on the model's routed layers after every step."""
        return ()

    def arrivals(self, steps: int) -> tuple[int, ...]:
        """Before which of so many steps new data arrives, the first aside; most tasks have all from the start."""
        return ()

    def arrived(self, seed: int, step: int) -> Sequence[Any]:
        """Batches of what is new at a step, on which criteria are measured; with no arrivals, none."""
        return ()
