"""Decode with a Llama-family model in native code: `step(tokens, cache) -> logits`, any mixture of layouts per linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadInput, Refused
from rarefy.core.roles import Rows
from rarefy.kernels.library import native, pointer
from rarefy.runtime.sieves import Sieve

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
CHUNK = 64  # tokens of a prompt that go through the layers together
ROOM = 256  # positions that a cache begins with


@dataclass(frozen=True)
class Sizes:
    """What a decoder is made of; `positions` is the longest context."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int
    positions: int
    eps: float


@dataclass(frozen=True)
class Block:
    """One layer: {name of LINEARS: (matrix, bias or None)}, its two norms' gains [hidden], and {name: what a gate lets through}.

    `units` in `sieves` is a gate on the units ``silu(gate x)`` before ``up x`` multiplies them, every other name one on what that
    linear reads. An entry that a sieve stops is exactly zero: a matrix stored by columns does not read its column, and a row of `up`
    whose unit it is is not computed for a single token.
    """

    linears: Mapping[str, tuple[Any, Tensor | None]]
    input_norm: Tensor
    post_norm: Tensor
    sieves: Mapping[str, Sieve] = field(default_factory=dict)


@dataclass
class KeyValues:
    """Keys and values of S sequences, [layers, S, kv_heads, capacity, head_dim] each, and how long each one is."""

    key: Tensor
    value: Tensor
    length: list[int] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        return self.key.shape[3]

    def select(self, rows: Tensor) -> None:
        """Let sequence i be what sequence rows[i] was, as beam search asks."""
        self.key, self.value = self.key.index_select(1, rows), self.value.index_select(1, rows)
        self.length = [self.length[int(r)] for r in rows]

    def crop(self, length: int) -> None:
        """Forget what lies beyond `length` positions."""
        self.length = [min(n, length) for n in self.length]


class Decoder:
    """A model as the native code sees it; it keeps the tensors that it is made of, uncopied.

    Matrices are those of `rarefy.kernels` (dense, bitmask, grouped), float32 beside them: final norm [H], cos and sin
    [P, head_dim / 2]. The embedding [V, H] is any matrix whose rows can be taken.

    Raises:
        Refused: the native kernels are not there.
        BadInput: a tensor of another shape, dtype or layout than the native code reads.
    """

    def __init__(self, sizes: Sizes, blocks: list[Block], embedding: Rows, final_norm: Tensor, head: Any, cos: Tensor, sin: Tensor) -> None:
        extension = native()
        if extension is None:
            raise Refused(
                "the native decoder", "this install has no native kernels, or they are switched off", "install with a C++ compiler, or run the model through transformers"
            )
        self.sizes, self.embedding, self.held = sizes, embedding, [blocks, final_norm, head, cos, sin]
        half = sizes.head_dim // 2
        if (embedding.rows, embedding.columns) != (sizes.vocab, sizes.hidden):
            raise BadInput(f"an embedding of {embedding.rows} x {embedding.columns}", f"the model's sizes say {sizes.vocab} x {sizes.hidden}")
        vectors: dict[str, tuple[Tensor, tuple[int, ...]]] = {"final_norm": (final_norm, (sizes.hidden,))}
        vectors |= {"cos": (cos, (sizes.positions, half)), "sin": (sin, (sizes.positions, half))}
        for number, block in enumerate(blocks):
            vectors |= {f"input_norm of layer {number}": (block.input_norm, (sizes.hidden,)), f"post_norm of layer {number}": (block.post_norm, (sizes.hidden,))}
        for name, (tensor, shape) in vectors.items():
            _must_be(name, tensor, shape)
        self._native = extension.Decoder(sizes.hidden, sizes.inner, sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.vocab, sizes.layers, sizes.positions, sizes.eps)
        self._native.shared(pointer(final_norm), pointer(cos), pointer(sin))
        for number, block in enumerate(blocks):
            self._native.norms(number, pointer(block.input_norm), pointer(block.post_norm))
            for name in LINEARS:
                self._put(number, name, *block.linears[name])
            for name, sieve in block.sieves.items():
                self._gate(number, name, sieve)
        self._put(0, "head", head, None)

    def _put(self, layer: int, name: str, matrix: Any, bias: Tensor | None) -> None:
        if not matrix.fast:
            raise BadInput(f"{name} of layer {layer}", "the decoder computes with float32 matrices on the CPU", "load the model with dtype float32")
        if bias is not None:
            _must_be(f"bias of {name} of layer {layer}", bias, (matrix.rows,))
        if not hasattr(self._native, matrix.kind):
            raise BadInput(
                f"{name} of layer {layer} in {matrix.kind}", "the native decoder has no product for it", "pack it in another layout, or run the model through transformers"
            )
        try:
            getattr(self._native, matrix.kind)(layer, name, *matrix.arguments(), pointer(bias))
        except ValueError as error:
            raise BadInput(f"{name} of layer {layer}, {matrix.rows} x {matrix.columns}", str(error)) from error

    def _gate(self, layer: int, name: str, sieve: Sieve) -> None:
        channels = 0 if sieve.threshold is None else sieve.threshold.numel()
        if sieve.threshold is not None:
            _must_be(f"threshold of {name} of layer {layer}", sieve.threshold, (channels,))
        try:
            self._native.gate(layer, name, pointer(sieve.threshold), channels, sieve.keep, sieve.block)
        except ValueError as error:
            raise BadInput(f"the gate of {name} of layer {layer}: {sieve}", str(error)) from error

    def cache(self, sequences: int) -> KeyValues:
        """An empty cache for so many sequences; it grows as they do."""
        return self._room(sequences, min(ROOM, self.sizes.positions))

    def _room(self, sequences: int, capacity: int) -> KeyValues:
        shape = (self.sizes.layers, sequences, self.sizes.kv_heads, capacity, self.sizes.head_dim)
        return KeyValues(torch.zeros(shape), torch.zeros(shape), [0] * sequences)

    def _grow(self, cache: KeyValues, length: int) -> None:
        if length > self.sizes.positions:
            raise BadInput(f"a context of {length} tokens", f"the model has {self.sizes.positions} positions", "shorten the prompt, or ask for fewer new tokens")
        if length <= cache.capacity:
            return
        larger = self._room(len(cache.length), min(max(length, 2 * cache.capacity), self.sizes.positions))
        larger.key[:, :, :, : cache.capacity] = cache.key
        larger.value[:, :, :, : cache.capacity] = cache.value
        cache.key, cache.value = larger.key, larger.value

    def step(self, ids: Tensor, cache: KeyValues, valid: Tensor | None = None, keep: int = 0) -> Tensor:
        """Append tokens to every sequence; logits [S, keep or T, V] of the last `keep` ones (0: of all).

        Args:
            ids: int64 [S, T].
            cache: of S sequences, extended in place.
            valid: bool [S, T], False at padding, which is skipped: it takes no position, and its logits are zeros.

        Raises:
            BadInput: a context longer than the model's positions, or an id outside the vocabulary; the cache is as before.
        """
        low, high = (int(end) for end in ids.aminmax()) if ids.numel() else (0, 0)
        if not 0 <= low <= high < self.sizes.vocab:
            raise BadInput(f"a token id of {high if low >= 0 else low}", f"it is outside the vocabulary of {self.sizes.vocab}")
        sequences, length = ids.shape
        if length == 1 and sequences == len(cache.length) and (valid is None or bool(valid.all())):
            return self._next(ids[:, 0], cache)
        if sequences != len(cache.length):
            raise BadInput(f"{sequences} sequences", f"the cache holds {len(cache.length)}")
        real = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid.bool()
        self._grow(cache, max(n + int(c) for n, c in zip(cache.length, real.sum(1), strict=True)))
        positions = torch.tensor(cache.length)[:, None] + real.cumsum(1) - 1
        sequence, column = real.nonzero(as_tuple=True)
        first = length - keep if keep else 0
        logits = torch.zeros(sequences, length - first, self.sizes.vocab)
        order = positions[sequence, column].argsort(stable=True)  # a chunk holds the next tokens of every sequence
        for chunk in order.split(CHUNK):
            self._chunk(ids, positions, sequence[chunk], column[chunk], cache, first, logits)
        cache.length = [n + int(c) for n, c in zip(cache.length, real.sum(1), strict=True)]
        return logits

    def _next(self, ids: Tensor, cache: KeyValues) -> Tensor:
        """One token for every sequence: what most steps are, without the bookkeeping of the others."""
        self._grow(cache, max(cache.length) + 1)
        x, every, out = self.embedding.take(ids).float().contiguous(), torch.arange(len(ids)), torch.empty(len(ids), self.sizes.vocab)
        self._run(x, every, torch.tensor(cache.length), cache, every, out)
        cache.length = [n + 1 for n in cache.length]
        return out[:, None]

    def _chunk(self, ids: Tensor, positions: Tensor, sequence: Tensor, column: Tensor, cache: KeyValues, first: int, logits: Tensor) -> None:
        x, position = self.embedding.take(ids[sequence, column]).float().contiguous(), positions[sequence, column].contiguous()
        wanted = (column >= first).nonzero()[:, 0]
        out = torch.empty(len(wanted), self.sizes.vocab)
        self._run(x, sequence.contiguous(), position, cache, wanted, out)
        logits[sequence[wanted], column[wanted] - first] = out

    def _run(self, x: Tensor, sequence: Tensor, position: Tensor, cache: KeyValues, wanted: Tensor, out: Tensor) -> None:
        tokens = (pointer(x), pointer(sequence), pointer(position), len(x))
        store = (pointer(cache.key), pointer(cache.value), len(cache.length), cache.capacity)
        try:
            self._native.step(*tokens, *store, pointer(wanted), len(wanted), pointer(out), torch.get_num_threads())
        except ValueError as error:
            raise BadInput(f"a step of {len(x)} tokens", str(error)) from error


def _must_be(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise BadInput(f"{name}: {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}", f"the decoder reads contiguous float32 {shape} on the CPU", "load the model in float32")
