"""Which operator computes with which layouts as they lie: the table, how it is added to, and what is said where it has no entry.

An entry is found for the layouts as they are; else for layouts that these can be turned into without loss; else there is
none, and the caller computes densely after `missing` said so, once for each operator and layouts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch

import rarefy.layouts as _layouts
from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Paper
from rarefy.core.roles import Layout, Selection
from rarefy.layouts.selections import All

DENSE = "dense"  # a plain tensor
ANY = "*"  # any layout, a plain tensor aside
ACTIONS = ("warn", "raise", "silent")

STEN = Paper(
    "sten",
    "STen: Productive and Efficient Sparsity in PyTorch",
    "arXiv 2304.07613; structure, API and the grouped layout as in github.com/spcl/sten",
    (
        "a weight in training stays a dense parameter, zero outside its mask, and is laid down in every forward, where the code's parameter is the stored one "
        "and its in-place updates go through a dense tensor: keys, optimizers, AMP and copies are those of the plain model, at the price of its memory",
        "gradients are selected and laid down in their format and handed on densely, because autograd sums dense tensors",
        "the gradient of an output lets through, by default, what the forward kept, which is the derivative; the code lets everything through",
        "an output is named by its module and the operator is the module's class, where the code names nodes of a torch.fx trace",
        "an operator without a registered derivative is computed again densely for it; what writes in place to a stored tensor is refused; compiled code lays nothing down",
        "n:m:g is grouped over outputs and chunked over inputs; the row of every slot is stored, in one byte up to 256 rows and two above, where the code takes int16; "
        "the code's CPU sparsifier is greedy only, its CUDA one swaps; ours does both, in a fixed order",
        "kept magnitude does not fall along multiples of g, because what obeys g obeys them too; rows are free inside a group here as in the code",
        "there is no native n:m:g kernel here, so the paper's speed is not reproduced",
    ),
)

F = TypeVar("F", bound=Callable[..., Any])
L = TypeVar("L", bound=type[Layout])


class DenseFallback(UserWarning):
    """An operator has no implementation for its layouts and was computed densely."""


@dataclass(frozen=True)
class Key:
    """An operator (a function of torch, or the class of a module), the layout of each tensor that it is given, in order, and what it makes.

    `keep` and `into`: the selection inside the operator and the layout of what it returns. `gradient`: the key is that
    of the derivative.
    """

    op: Any
    layouts: tuple[str, ...]
    keep: type[Selection] = All
    into: str = DENSE
    gradient: bool = False

    paper: ClassVar[Paper] = STEN


_operators: dict[Key, Callable[..., Any]] = {}
_selections: dict[tuple[type[Selection], str, str], Callable[..., Any]] = {}


def add(kind: L) -> L:
    """Register the class of a layout under its name; decorates it.

    Raises:
        Refused: another layout has the name.
    """
    part = kind()
    _put(_layouts.LAYOUTS, part.name, part, f"layout {part.name!r}", type(_layouts.LAYOUTS.get(part.name)))
    return kind


def implements(op: Any, *layouts: str, keep: type[Selection] = All, into: str = DENSE) -> Callable[[F], F]:
    """Register what computes `op` for tensors of these layouts; decorates a function of the operator's own arguments.

    A tensor in a layout arrives as a `rarefy.layouts.tensor.LayoutTensor`. With `keep` the first argument is the
    selection, and the function drops what it does not keep; with `into` it returns a tensor of that layout. It need not
    be differentiable: without an entry from `differentiates` the derivative is that of the dense operator.

    Raises:
        Refused: there is an entry already.
    """
    return _entry(Key(canonical(op), layouts, keep, into))


def differentiates(op: Any, *layouts: str) -> Callable[[F], F]:
    """Register the derivative of `op` for tensors of these layouts; decorates a function of the gradient and the operator's arguments.

    It returns a gradient, or None, for each tensor argument.
    """
    return _entry(Key(canonical(op), layouts, gradient=True))


def selects(selection: type[Selection], source: str, into: str) -> Callable[[F], F]:
    """Register what turns a tensor of layout `source` into one of `into` that keeps what `selection` says; decorates a function of both."""

    def register(function: F) -> F:
        entry = (selection, source, into)
        _put(_selections, entry, function, f"{selection.__name__} from {source} to {into}", _selections.get(entry))
        return function

    return register


def canonical(op: Any) -> Any:
    """The function of torch that a method of a tensor stands for, where there is one of that name: one operator has one key.

    >>> canonical(torch.Tensor.neg) is torch.neg, canonical(torch.nn.functional.linear) is torch.nn.functional.linear
    (True, True)
    """
    name = getattr(op, "__name__", "")
    return getattr(torch, name.strip("_"), op) if name and getattr(torch.Tensor, name, None) is op else op


def _entry(key: Key) -> Callable[[F], F]:
    def register(function: F) -> F:
        _put(_operators, key, function, _say(key), _operators.get(key))
        return function

    return register


def _put(table: dict[Any, Any], key: Any, value: Any, what: str, before: Any) -> None:
    """A cell of a notebook may run again; another entry may not take the place."""
    who = value if callable(value) else type(value)
    if key in table and (before.__module__, before.__qualname__) != (who.__module__, who.__qualname__):
        raise Refused(what, f"{before.__module__}.{before.__qualname__} is registered for it", "change that one, or take another name")
    table[key] = value


def find(key: Key) -> tuple[Callable[..., Any], tuple[str, ...]] | None:
    """What computes it, and the layouts that it takes the tensors in; None where nothing does."""
    found = [(changes, entry) for entry in _operators if (changes := _changes(key, entry)) is not None]
    if not found:
        return None
    best = min(found, key=lambda each: each[0])[1]
    taken = tuple(have if want == ANY else want for have, want in zip(key.layouts, best.layouts, strict=True))
    return _operators[best], taken


def _changes(key: Key, entry: Key) -> tuple[int, int] | None:
    """How many tensors must be converted for an entry and how many it takes in any layout; None where it does not fit."""
    if (entry.op, entry.keep, entry.into, entry.gradient, len(entry.layouts)) != (key.op, key.keep, key.into, key.gradient, len(key.layouts)):
        return None
    pairs = list(zip(key.layouts, entry.layouts, strict=True))
    if not all(have == want or (have != DENSE and (want == ANY or (want != DENSE and _layouts.LAYOUTS[want].lossless))) for have, want in pairs):
        return None
    return sum(want not in (have, ANY) for have, want in pairs), sum(want == ANY for _, want in pairs)


def selector(selection: Selection, source: str, into: str) -> Callable[..., Any] | None:
    """What `selects` registered; None, after `missing` where the tensor is in a layout and not all of it is kept, for the way over the dense tensor."""
    found = _selections.get((type(selection), source, into))
    if found is None and source != DENSE and type(selection) is not All:
        missing((type(selection), source, into))
    return found


@dataclass
class _Policy:
    action: str = "warn"
    told: set[Any] = field(default_factory=set)


_OUTSIDE = _Policy()
_policy: ContextVar[_Policy | None] = ContextVar("rarefy_missing", default=None)


@contextmanager
def when_missing(action: str) -> Iterator[None]:
    """Inside, an operator without an implementation warns (once for each operator and layouts), raises, or is silent.

    Raises:
        BadInput: another action.
    """
    if action not in ACTIONS:
        raise BadInput(f"action {action!r}", f"what is done about a missing implementation is one of {', '.join(ACTIONS)}")
    token = _policy.set(_Policy(action))
    try:
        yield
    finally:
        _policy.reset(token)


def policy() -> _Policy:
    """The policy of here and now, to be asked later where a backward pass runs."""
    return _policy.get() or _OUTSIDE


def missing(key: Key | tuple[type[Selection], str, str], asked: _Policy | None = None) -> None:
    """Say that nothing is registered for it, with the snippet that would.

    Raises:
        Refused: inside `when_missing("raise")`.
    """
    now = asked or policy()
    text = snippet(key)
    if now.action == "raise":
        raise Refused(_say(key), "nothing is registered for it, and when_missing is 'raise'", f"register it:\n\n{text}\n")
    if now.action == "warn" and key not in now.told:
        now.told.add(key)
        warnings.warn(f"{_say(key)}: nothing is registered for it, so it is computed densely. To register it:\n\n{text}", DenseFallback, stacklevel=2)


def _say(key: Any) -> str:
    if not isinstance(key, Key):
        return f"{key[0].__name__} from {key[1]} to {key[2]}"
    made = "" if (key.keep, key.into) == (All, DENSE) else f" that keeps {key.keep.__name__} into {key.into}"
    return f"{'the derivative of ' if key.gradient else ''}{name_of(key.op)} of ({', '.join(key.layouts)}){made}"


def name_of(op: Any) -> str:
    """How the operator is written in code.

    >>> name_of(torch.nn.functional.linear), name_of(torch.Tensor.add), name_of(torch.nn.ReLU)
    ('torch.nn.functional.linear', 'torch.Tensor.add', 'torch.nn.modules.activation.ReLU')
    """
    return torch.overrides.resolve_name(op) or f"{getattr(op, '__module__', 'torch')}.{getattr(op, '__qualname__', repr(op))}"


def snippet(key: Key | tuple[type[Selection], str, str]) -> str:
    """The code that would register it: a function whose body is left to write.

    >>> print(snippet(Key(torch.neg, ("csr",))))
    import torch
    from rarefy.layouts.registry import implements
    <BLANKLINE>
    @implements(torch.neg, 'csr')
    def neg_csr(*args, **kwargs):
        ...  # what torch.neg(*args, **kwargs) is; of a tensor in a layout, x.packed are its bytes and x.matrix() computes with them
    """
    if not isinstance(key, Key):
        kind, source, into = key
        names = f"from {kind.__module__} import {kind.__name__}\nfrom rarefy.layouts.registry import selects\nfrom rarefy.layouts.tensor import LayoutTensor"
        make = f"    ...  # LayoutTensor.of(values, {into!r}) of what selection.mask keeps; x.packed are the bytes of x"
        return f"{names}\n\n@selects({kind.__name__}, {source!r}, {into!r})\ndef {_word(kind.__name__, source, into)}(selection, x):\n{make}"
    name = name_of(key.op)
    module = "torch" if name.startswith("torch.") else name.rpartition(".")[0]
    how = "differentiates" if key.gradient else "implements"
    made = "" if (key.keep, key.into) == (All, DENSE) else f", keep={key.keep.__name__}, into={key.into!r}"
    imports = f"import {module}\n" + (f"from {key.keep.__module__} import {key.keep.__name__}\n" if made else "") + f"from rarefy.layouts.registry import {how}"
    first = ("gradient, " if key.gradient else "") + ("" if key.keep is All else "selection, ")
    what = f"the gradient of each tensor that {name}(*args, **kwargs) is given" if key.gradient else f"what {name}(*args, **kwargs) is"
    more = "" if key.keep is All else ", without what selection drops"
    return (
        f"{imports}\n\n@{how}({name}, {', '.join(map(repr, key.layouts))}{made})\n"
        f"def {_word(*(['grad'] if key.gradient else []), name.rpartition('.')[2], *key.layouts)}({first}*args, **kwargs):\n"
        f"    ...  # {what}{more}; of a tensor in a layout, x.packed are its bytes and x.matrix() computes with them"
    )


def _word(*parts: str) -> str:
    return "_".join("".join(c if c.isalnum() else "_" for c in part) for part in parts).lower()
