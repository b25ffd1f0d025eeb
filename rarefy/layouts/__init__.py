"""How a choice is stored: a matrix with zeros as one-dimensional bytes, and computed with as it lies. Found by walking this package."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from rarefy.core.roles import Layout

_modules = [importlib.import_module(found.name) for found in pkgutil.iter_modules(__path__, __name__ + ".")]
_classes = [value for module in _modules for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__]
LAYOUTS: dict[str, Layout] = {kind.name: kind() for kind in _classes if issubclass(kind, Layout) and kind.__dict__.get("name")}
