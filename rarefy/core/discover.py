"""Discovery: a method is found by walking the package, entry points and plug-in files. There is no registry."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from rarefy.core.errors import BadInput, MissingExtra
from rarefy.core.records import Gating, Recipe, TrainRecipe

T = TypeVar("T")
V = TypeVar("V", Recipe, TrainRecipe, Gating)
ENTRY_POINT_GROUP = "rarefy.plugins"
ROOMS = ("layouts", "weights", "experts", "activations", "surgery", "runtime", "tasks", "probes")
_plugins: list[ModuleType] = []


@cache
def modules() -> tuple[ModuleType, ...]:
    """Every module of ours that may hold a part; a module whose optional dependency is absent is left out."""
    found = []
    for room in ROOMS:
        name = f"rarefy.{room}"
        package = importlib.import_module(name)
        found.append(package)
        for info in pkgutil.walk_packages(package.__path__, name + "."):
            try:
                found.append(importlib.import_module(info.name))
            except (MissingExtra, ModuleNotFoundError) as absent:
                if str(getattr(absent, "name", "") or "").startswith("rarefy"):
                    raise
    found += [point.load() for point in entry_points(group=ENTRY_POINT_GROUP)]
    return tuple(found)


def load_plugin(path: str | Path) -> ModuleType:
    """Import one file of the user's; its parts are discovered like ours.

    Raises:
        BadInput: no such file, or it does not import.
    """
    file = Path(path).resolve()
    spec = importlib.util.spec_from_file_location(f"rarefy_plugin_{file.stem}", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise BadInput(f"plug-in {path}", "a plug-in is a Python file that exists")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(spec.name, None)
        raise BadInput(f"plug-in {path}", f"it must import, and raised {type(error).__name__}: {error}") from error
    _plugins[:] = [m for m in _plugins if m.__name__ != module.__name__] + [module]
    return module


def methods(role: type[T]) -> dict[str, type[T]]:
    """{name: class} of every final, named class of a role, in order of name."""
    found: dict[str, type[T]] = {}
    for module in (*modules(), *_plugins):
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, role) and not inspect.isabstract(value) and value.__dict__.get("name") and value.__module__ == module.__name__:
                found[value.__dict__["name"]] = value
    return dict(sorted(found.items()))


def recipes() -> dict[str, Recipe]:
    """{name: value} of every once-recipe that a module defines."""
    return _values(Recipe)


def train_recipes() -> dict[str, TrainRecipe]:
    """{name: value} of every training recipe that a module defines."""
    return _values(TrainRecipe)


def gatings() -> dict[str, Gating]:
    """{name: value} of every gating that a module defines."""
    return _values(Gating)


def _values(kind: type[V]) -> dict[str, V]:
    found = {v.name: v for m in (*modules(), *_plugins) for v in vars(m).values() if isinstance(v, kind)}
    return dict(sorted(found.items()))


def pick(table: dict[str, T], name: str, what: str) -> T:
    """table[name], or one sentence that lists what there is."""
    if name not in table:
        raise BadInput(f"{what} {name!r}", f"known are {', '.join(table) or 'none'}")
    return table[name]


def papers() -> dict[str, list[Any]]:
    """{slug: the discovered classes and recipes that carry it}."""
    found: dict[str, list[Any]] = {}
    for module in (*modules(), *_plugins):
        for value in vars(module).values():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            paper = getattr(value, "paper", None) if own or isinstance(value, (Recipe, TrainRecipe, Gating)) else None
            if paper is not None and value not in found.setdefault(paper.slug, []):
                found[paper.slug].append(value)
    return dict(sorted(found.items()))


def part(role: type[T], text: str) -> T:
    """The part that a text names, its hyper-parameters as `name:field=value,field=value`.

    Raises:
        BadInput: an unknown name, an unknown field, or a value that the field does not take.

    >>> from rarefy.core.roles import Allocation
    >>> part(Allocation, "uniform")
    Uniform()
    """
    name, _, options = text.partition(":")
    kind: Any = pick(methods(role), name, role.__name__.lower())
    fields = set(inspect.signature(kind).parameters)
    given = dict(option.partition("=")[::2] for option in options.split(",") if option)
    unknown = sorted(set(given) - fields)
    if unknown:
        raise BadInput(f"{text!r}", f"{name} has the fields {', '.join(sorted(fields)) or 'none'}, not {', '.join(unknown)}")
    try:
        return kind(**{key: _value(value) for key, value in given.items()})
    except TypeError as error:
        raise BadInput(f"{text!r}", f"a field of {name} is missing or has a value of the wrong kind", f"write for example {name}:{min(fields, default='field')}=0.5") from error


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
