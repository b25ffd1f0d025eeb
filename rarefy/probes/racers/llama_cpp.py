"""llama.cpp over a GGUF file, through the package llama-cpp-python (not one of ours: install it to compare)."""

from __future__ import annotations

import ctypes
import importlib
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.core.errors import BadFile, BadInput, RarefyError
from rarefy.hub.demo import MODEL
from rarefy.hub.load import DEMO
from rarefy.probes.racers.racer import Died, Racer

CONTEXT = 1024  # positions
TRIAL = """
import sys
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=1024, n_batch=1024, n_threads=int(sys.argv[2]), n_threads_batch=int(sys.argv[2]), logits_all=True, verbose=False)
model.eval([number % model.n_vocab() for number in range(256)])
model.eval([0])
"""


class LlamaCpp:
    """Decoding by the C interface, so that the binding's own work is not timed: no copy of the logits, their largest taken with numpy."""

    density, tokenizer = 1.0, None

    def __init__(self, path: Path) -> None:
        self.c = _package()
        self.name, self.precision, self.model_bytes = path.name, _types(path), path.stat().st_size
        threads = torch.get_num_threads()
        self.engine = f"llama.cpp (llama-cpp-python {self.c.__version__})"
        self.held = self.c.Llama(str(path), n_ctx=CONTEXT, n_batch=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)
        self.vocabulary = self.held.n_vocab()
        self.context = self.held.ctx

    def time(self, prompt: Tensor, tokens: int) -> float:
        self._forget()
        following = int(self._step(prompt[0].tolist())[-1].argmax())
        began = time.perf_counter()
        for _ in range(tokens):
            following = int(self._step([following])[-1].argmax())
        return (time.perf_counter() - began) / tokens

    def nll(self, windows: Sequence[Tensor]) -> list[Tensor]:
        return [self._scored(window) for window in windows]

    def _scored(self, window: Tensor) -> Tensor:
        self._forget()
        logits = torch.from_numpy(self._step(window.tolist(), every=True).astype(np.float64))[:-1]
        return -logits.log_softmax(-1).gather(1, window[1:, None])[:, 0]

    def _forget(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        self.position = 0

    def _step(self, ids: list[int], every: bool = False) -> Any:
        """Logits [1 or T, V], where llama.cpp has them."""
        batch = self.c.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for row, token in enumerate(ids):
                batch.token[row], batch.pos[row] = token, self.position + row
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
                batch.logits[row] = every or row == len(ids) - 1
            if self.c.llama_decode(self.context, batch):
                raise BadInput(f"{len(ids)} tokens at position {self.position}", "llama.cpp refused them", f"the context has {CONTEXT} positions")
        finally:
            self.c.llama_batch_free(batch)
        self.position += len(ids)
        rows = len(ids) if every else 1
        return np.ctypeslib.as_array(ctypes.cast(self.c.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float)), (rows, self.vocabulary))


def racer(spec: str, head: str | None) -> Racer:
    if head is not None:
        raise BadInput(f"head {head!r} with llama.cpp", "the file says how its head is stored", "leave +LAYOUT out")
    path = MODEL.path() if spec == DEMO else Path(spec).expanduser()
    if path.suffix != ".gguf" or not path.is_file():
        raise BadFile(spec, "llama.cpp reads GGUF files", "name one, or demo")
    _package()
    tried(path)
    return LlamaCpp(path)


def tried(path: Path) -> None:
    """Load the file, score a window and decode a token in another process first, since what dies in native code takes its process with it.

    Raises:
        Died: it did, and of what; any other failure is left to be raised where it can be caught.
    """
    done = subprocess.run([sys.executable, "-c", TRIAL, str(path), str(torch.get_num_threads())], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    if done.returncode < 0:
        died = signal.Signals(-done.returncode).name
        raise Died(
            f"{path.name}@llama.cpp", f"llama.cpp's native code died of {died} in a trial on this machine, so the race goes on without it", "try another build of llama-cpp-python"
        )


def _types(path: Path) -> str:
    """The types of the tensors with two dimensions, most weights first: llama.cpp falls back to others where a row does not fit."""
    from gguf import GGUFReader

    kinds: Counter[str] = Counter()
    for tensor in GGUFReader(str(path)).tensors:
        if len(tensor.shape) == 2:
            kinds[tensor.tensor_type.name] += int(tensor.n_elements)
    return ", ".join(f"{name} {count / sum(kinds.values()):.0%}" for name, count in kinds.most_common())


def _package() -> Any:
    try:
        return importlib.import_module("llama_cpp")
    except ImportError as error:
        raise RarefyError("llama-cpp-python is not installed", "llama.cpp is a peer, not a part of rarefy", "run pip install llama-cpp-python") from error
