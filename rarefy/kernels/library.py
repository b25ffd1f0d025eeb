"""The native extension: whether it is there, which instruction set it runs, and how to do without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

SWITCH = "RAREFY_NATIVE"  # "off" computes everything in PyTorch
INSTRUCTION_SETS = ("generic", "avx2", "avx512")

try:  # torch comes first: its OpenMP runtime is then the only one in the process
    from rarefy.kernels import _native as _extension  # type: ignore[attr-defined]
except ImportError:
    _extension = None


def native() -> Any | None:
    """The extension, or None where it was not built or is switched off."""
    return None if os.environ.get(SWITCH, "").lower() == "off" else _extension


def describe() -> str:
    """What computes here, in a few words.

    >>> describe().split()[0] in ("native", "PyTorch")
    True
    """
    extension = native()
    if extension is not None:
        return f"native kernels ({extension.isa()}{'' if extension.openmp() else ', one thread'})"
    why = "switched off" if _extension is not None else "built without a compiler"
    return f"PyTorch only, slower (native kernels {why})"


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Compute with the kernels of one instruction set inside the block; process-wide, so for tests and benchmarks.

    Raises ValueError where this build or machine lacks it.
    """
    assert _extension is not None
    before = _extension.isa()
    _extension.use(name)
    try:
        yield
    finally:
        _extension.use(before)


def available() -> list[str]:
    """The instruction sets that run on this machine, weakest first."""
    found = []
    for name in INSTRUCTION_SETS if _extension is not None else ():
        try:
            with instruction_set(name):
                found.append(name)
        except ValueError:
            continue
    return found


def pointer(tensor: Tensor | None) -> int:
    """The address that a kernel may read: 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def usable() -> bool:
    """Whether the extension may compute now: it is here, and nothing rewrites torch's calls as the compiler, `torch.func` and derivatives carried forward do."""
    return not (native() is None or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def suits(*tensors: Tensor | None) -> bool:
    """Whether these can be handed to a kernel as they are: `usable`, float32 on the CPU, contiguous, no gradient wanted."""
    if not usable():
        return False
    here = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in here):
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in here)


class Kernel(Protocol):
    """A matrix [O, I] that the extension takes by its `arguments` where it is `fast`."""

    kind: str
    rows: int
    columns: int
    fast: bool

    def dense(self) -> Tensor:
        """The matrix [O, I]."""

    def arguments(self) -> tuple[int, ...]:
        """What the native side takes a matrix of this kind by."""


def product(matrix: Kernel, x: Tensor, bias: Tensor | None, few: float) -> Tensor:
    """``y = x W^T + b``: x [..., I] -> y [..., O], by the kernel of the matrix's kind where that suits and x has at most `few` rows, else by torch."""
    batch = x.numel() // max(1, matrix.columns)
    if not (matrix.fast and batch <= few and suits(x, bias)):
        return F.linear(x, matrix.dense().to(x.dtype), bias)
    y = torch.empty(*x.shape[:-1], matrix.rows)
    compute = getattr(native(), f"{matrix.kind}_linear")
    compute(*matrix.arguments(), pointer(x), pointer(bias), pointer(y), batch, torch.get_num_threads())
    return y
