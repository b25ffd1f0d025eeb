"""Products by llama.cpp's kernels, through the library that llama-cpp-python ships; weights are repacked as llama.cpp does when it loads a model."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadInput, RarefyError

TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 8, "q4_K": 12}
F32 = 0
ROOM = 1 << 20  # bytes for the descriptions of tensors and a graph, no values
Address = ctypes.c_void_p


class Options(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", Address), ("no_alloc", ctypes.c_bool)]


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, Address)
_silent = LOG(lambda level, text, data: None)

# {function: (result, arguments)} of the C interface
INTERFACE: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (Address, [Options]),
    "ggml_free": (None, [Address]),
    "ggml_new_tensor_2d": (Address, [Address, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
    "ggml_mul_mat": (Address, [Address] * 3),
    "ggml_new_graph": (Address, [Address]),
    "ggml_build_forward_expand": (None, [Address] * 2),
    "ggml_row_size": (ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]),
    "ggml_quantize_chunk": (ctypes.c_size_t, [ctypes.c_int, Address, Address, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, Address]),
    "ggml_backend_reg_dev_get": (Address, [Address, ctypes.c_size_t]),
    "ggml_backend_reg_get_proc_address": (Address, [Address, ctypes.c_char_p]),
    "ggml_backend_alloc_ctx_tensors": (Address, [Address] * 2),
    "ggml_backend_alloc_ctx_tensors_from_buft": (Address, [Address] * 2),
    "ggml_backend_buffer_free": (None, [Address]),
    "ggml_backend_tensor_set": (None, [Address, Address, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_tensor_get": (None, [Address, Address, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_graph_compute": (ctypes.c_int, [Address] * 2),
    "ggml_log_set": (None, [LOG, Address]),
}
CPU: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_cpu_reg": (Address, []),
    "ggml_backend_cpu_init": (Address, []),
    "ggml_backend_cpu_set_n_threads": (None, [Address, ctypes.c_int]),
}


@cache
def library() -> Any:
    """The functions above.

    Raises:
        RarefyError: llama-cpp-python is not installed.
    """
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise RarefyError("llama-cpp-python is not installed", "llama.cpp is a peer, not a part of rarefy", "run pip install llama-cpp-python")
    folder = Path(found.origin).parent / "lib"
    functions = type("Ggml", (), {})()
    for file, wanted in (("libggml-base.so", INTERFACE), ("libggml-cpu.so", CPU)):
        opened = ctypes.CDLL(str(folder / file), ctypes.RTLD_GLOBAL)
        for name, (result, arguments) in wanted.items():
            function = getattr(opened, name)
            function.restype, function.argtypes = result, arguments
            setattr(functions, name, function)
    functions.ggml_log_set(_silent, None)
    return functions


@dataclass(frozen=True)
class Quantised:
    """A matrix [O, I] in one of llama.cpp's types: uint8 [bytes], row by row."""

    kind: str
    bytes: Tensor
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.bytes.numel()

    def dense(self) -> Tensor:
        """The weights as the type rounds them, [O, I]."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return torch.from_numpy(dequantize(self.bytes.view(self.rows, -1).numpy(), GGMLQuantizationType(TYPES[self.kind])))


def quantised(weight: Tensor, kind: str) -> Quantised:
    """A weight [O, I] by llama.cpp's own quantiser.

    Raises:
        BadInput: a width that the type has no blocks for.
    """
    (rows, columns), c = weight.shape, library()
    if columns % (256 if kind.endswith("K") else 32):
        raise BadInput(f"{kind} of {columns} columns", "llama.cpp quantises blocks of 32 columns, K types of 256", "take another shape or type")
    w, out = weight.float().contiguous(), torch.empty(rows * c.ggml_row_size(TYPES[kind], columns), dtype=torch.uint8)
    c.ggml_quantize_chunk(TYPES[kind], w.data_ptr(), out.data_ptr(), 0, rows, columns, None)
    return Quantised(kind, out, rows, columns)


class GgmlMatrix:
    """``y = x W^T`` by llama.cpp's own kernels, over a copy of the weights."""

    def __init__(self, codes: Quantised) -> None:
        self.c, self.rows, self.columns, self.kind = library(), codes.rows, codes.columns, codes.kind
        self.buffers: list[Any] = []
        self.weights = self.c.ggml_init(Options(ROOM, None, True))
        self.tensor = self.c.ggml_new_tensor_2d(self.weights, TYPES[self.kind], self.columns, self.rows)
        self.buffers.append(self._repacked() or self.c.ggml_backend_alloc_ctx_tensors(self.weights, _backend()))
        self.c.ggml_backend_tensor_set(self.tensor, codes.bytes.data_ptr(), 0, codes.size)
        self.graphs: dict[int, tuple[Any, Any, Any, Any]] = {}

    def _repacked(self) -> Any:
        """Memory of llama.cpp's other layouts for this type, or None where it has none."""
        registry = self.c.ggml_backend_cpu_reg()
        get = self.c.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not get:
            return None
        kinds = ctypes.cast(ctypes.CFUNCTYPE(Address, Address)(get)(self.c.ggml_backend_reg_dev_get(registry, 0)), ctypes.POINTER(Address))
        return self.c.ggml_backend_alloc_ctx_tensors_from_buft(self.weights, kinds[0]) if kinds and kinds[0] and self.kind in ("q4_0", "q4_K") else None

    def linear(self, x: Tensor) -> Tensor:
        """x float32 [B, I] -> [B, O]."""
        batch = x.shape[0]
        if batch not in self.graphs:
            self.graphs[batch] = self._graph(batch)
        _, into, out, graph = self.graphs[batch]
        x, y = x.contiguous(), torch.empty(batch, self.rows)
        self.c.ggml_backend_tensor_set(into, x.data_ptr(), 0, x.numel() * 4)
        self.c.ggml_backend_cpu_set_n_threads(_backend(), torch.get_num_threads())
        if self.c.ggml_backend_graph_compute(_backend(), graph):
            raise RuntimeError("llama.cpp could not compute the product")
        self.c.ggml_backend_tensor_get(out, y.data_ptr(), 0, y.numel() * 4)
        return y

    def _graph(self, batch: int) -> tuple[Any, Any, Any, Any]:
        context = self.c.ggml_init(Options(ROOM, None, True))
        into = self.c.ggml_new_tensor_2d(context, F32, self.columns, batch)
        out = self.c.ggml_mul_mat(context, self.tensor, into)
        graph = self.c.ggml_new_graph(context)
        self.c.ggml_build_forward_expand(graph, out)
        self.buffers.append(self.c.ggml_backend_alloc_ctx_tensors(context, _backend()))
        return context, into, out, graph

    def __del__(self) -> None:
        for buffer in getattr(self, "buffers", []):
            self.c.ggml_backend_buffer_free(buffer)
        for context in [each[0] for each in getattr(self, "graphs", {}).values()] + ([self.weights] if hasattr(self, "weights") else []):
            self.c.ggml_free(context)


@cache
def _backend() -> Any:
    return library().ggml_backend_cpu_init()


PREFIX = "llama.cpp-"
NAMES: Mapping[str, str] = {PREFIX + kind: kind for kind in TYPES}
