"""Where contract functions are registered, and how they run."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch

from rarefy.core.errors import BadInput
from rarefy.core.roles import Role

Contract = Callable[[Any], None]
_contracts: dict[type[Any], list[Contract]] = {}


def contract(role: type[Any]) -> Callable[[Contract], Contract]:
    """Register a function as part of the contract of a role."""

    def register(function: Contract) -> Contract:
        _contracts.setdefault(role, []).append(function)
        return function

    return register


def contracts_of(kind: type[Any]) -> tuple[Contract, ...]:
    """The contract functions for instances of a class, those of its role first."""
    return tuple(function for role, functions in _contracts.items() if role is not Role and issubclass(kind, role) for function in functions)


def run(part: Any) -> int:
    """Run every contract function over one part; returns how many ran."""
    functions = contracts_of(type(part))
    if not functions:
        raise BadInput(f"{type(part).__name__}", "only parts of a role with a contract can be checked", f"roles with one: {', '.join(r.__name__ for r in _contracts)}")
    functions += _contracts_of_all(part)
    excused = getattr(part, "exceptions", {})
    for function in functions:
        if function.__name__ in excused:
            _must_fail(function, part, excused[function.__name__])
        else:
            function(part)
    return len(functions)


def _contracts_of_all(part: Any) -> tuple[Contract, ...]:
    """What every part keeps that is a value; a View is a module, which has neither a name nor a repr that tells it."""
    return tuple(_contracts[Role]) if isinstance(part, Role) else ()


def _must_fail(function: Contract, part: Any, reason: str) -> None:
    try:
        function(part)
    except AssertionError:
        return
    raise AssertionError(f"{part!r} declares an exception to {function.__name__} ({reason}) and keeps the contract: remove the exception")


def through_a_file(part: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A part's running state, saved and loaded as a checkpoint would: plain containers, numbers, strings and tensors."""
    saved = io.BytesIO()
    try:
        torch.save(state, saved)
        saved.seek(0)
        loaded: dict[str, Any] = torch.load(saved, weights_only=True)
    except Exception as error:
        raise AssertionError(f"{part!r}: its state must be plain, and is {state}") from error
    return loaded


@contract(Role)
def has_a_name(part: Any) -> None:
    assert type(part).__dict__.get("name"), f"{type(part).__name__} needs a name of its own"


@contract(Role)
def copies_pickles_and_saves(part: Any) -> None:
    saved = io.BytesIO()
    torch.save(part, saved)
    saved.seek(0)
    copies = (copy.deepcopy(part), pickle.loads(pickle.dumps(part)), torch.load(saved, weights_only=False))
    assert all(repr(each) == repr(part) and type(each) is type(part) for each in copies), f"{part!r} does not survive a copy"
