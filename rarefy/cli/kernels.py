"""What computes here: for `rarefy --version`, and for the verbs that are slow without the native kernels."""

from __future__ import annotations

import importlib
import os
import platform

import torch

import rarefy
from rarefy.cli.output import err
from rarefy.kernels.library import SWITCH, native

MODULE = "rarefy.kernels._native"
REBUILD = "with a C++17 compiler, pip install --force-reinstall --no-cache-dir rarefy builds them"


def version() -> str:
    """The lines of `rarefy --version`."""
    versions = f"torch {torch.__version__}, transformers {_transformers()}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return f"rarefy {rarefy.__version__}\n{kernels()}\n{versions}"


def kernels() -> str:
    """One line: the instruction set and threads of the native kernels, or why there are none."""
    extension = native()
    if extension is None:
        return f"native kernels: none, everything runs in PyTorch, slower ({absent_because()})"
    threads = torch.get_num_threads() if extension.openmp() else 1
    return f"native kernels: {extension.isa()}, {threads} thread{'' if threads == 1 else 's'}{'' if extension.openmp() else ' (built without OpenMP)'}"


def absent_because() -> str:
    """Why the native kernels are not used, and what brings them."""
    if os.environ.get(SWITCH, "").lower() == "off":
        return f"{SWITCH}=off in the environment"
    try:
        importlib.import_module(MODULE)
    except ModuleNotFoundError:
        return f"they were not built; {REBUILD}"
    except ImportError as error:
        return f"they do not load: {error}; {REBUILD}"
    return "they were not there when rarefy was imported"


def say_absent() -> None:
    """One line on standard error where a verb goes without the native kernels."""
    if native() is None:
        err.print(f"note: {kernels()}", highlight=False, soft_wrap=True, markup=False)


def _transformers() -> str:
    try:
        return str(importlib.import_module("transformers").__version__)
    except ModuleNotFoundError:
        return "not installed (pip install 'rarefy[hub]')"
