"""The contract of every role, public: `rarefy.testing.check(MyCriterion)`.

A contract is a set of functions `(part) -> None` that assert, registered with `@contract(Role)` in a file of this
package. A part's class declares true exceptions as ``exceptions = {"function name": "reason"}``: those must fail.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from rarefy.core.roles import Affinity, Bank, Role, View
from rarefy.testing.contract import Contract, contract, contracts_of, run

__all__ = ["Contract", "check", "contract", "contracts_of", "has_contract"]

for _found in pkgutil.iter_modules(__path__, __name__ + "."):
    importlib.import_module(_found.name)


def has_contract(role: type[Any]) -> bool:
    """Whether any contract function is registered for parts of this role."""
    return bool(contracts_of(role))


def check(part: Any) -> int:
    """Run the contract of its role over a part, or over the `examples()` of a class; returns how many checks ran.

    Raises:
        AssertionError: a part breaks its contract, or keeps one that its class declares as an exception.
        BadInput: no role with a contract.

    >>> from rarefy.weights.criteria.magnitude import Magnitude
    >>> check(Magnitude) > 0
    True
    """
    parts: tuple[Any, ...] = part.examples() if inspect.isclass(part) and issubclass(part, (Affinity, Bank, Role, View)) else (part,)
    ran: int = sum(run(each) for each in parts)
    return ran
