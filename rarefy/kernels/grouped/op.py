"""The operation that layers call: native where it suits, the dense product elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.core.errors import BadFile
from rarefy.kernels.bitmask.reference import mask_of
from rarefy.kernels.grouped import reference
from rarefy.kernels.grouped.reference import GROUP
from rarefy.kernels.library import native, pointer, product

FEW = 16  # rows of x up to which the kernel multiplies; above, the weights are unpacked once and the dense product is faster


class GroupedMatrix:
    """A matrix [O, I] of which some groups are stored: codes uint8 [n, 32 or 16], scale and zero float16 [n].

    `bits` uint8 [O, ceil(G / 8)], low bit first, says which of the G groups of a row they are.

    Raises:
        BadFile: the groups do not account for the codes.

    >>> first = torch.tensor([[1], [0]], dtype=torch.uint8)
    >>> m = GroupedMatrix(torch.full((1, 32), 129, dtype=torch.uint8), torch.tensor([0.5]).half(), None, first, 3, 8)
    >>> m.linear(torch.tensor([[127.0, 0.0, 1.0]])).tolist(), m.dense().tolist()
    ([[64.0, 0.0]], [[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]])
    """

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor | None, present: Tensor, columns: int, bits: int) -> None:
        groups = -(-columns // GROUP)
        counts = mask_of(present, groups).sum(1)
        stored = int(counts.sum())
        if codes.shape != (stored, GROUP * bits // 8) or scale.numel() != stored or present.shape[1] != -(-groups // 8) or (zero is not None and zero.numel() != stored):
            raise BadFile("a grouped matrix", f"{stored} groups are present and codes of {tuple(codes.shape)} are stored", "write the file again")
        self.codes, self.scale, self.zero, self.present = codes, scale, zero, present
        self.rows, self.columns, self.bits = present.shape[0], columns, bits
        self.fast = native() is not None and codes.device.type == "cpu" and all(t.is_contiguous() for t in (codes, scale)) and stored > 0
        self.start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        if self.fast:
            self.skips = None if stored == self.rows * groups else present.contiguous()

    def dense(self) -> Tensor:
        """The matrix [O, I] as float32."""
        return reference.unpack(self.codes, self.scale, self.zero, self.present, self.columns, self.bits)

    def take(self, ids: Tensor) -> Tensor:
        """Rows [..., I] of ids [...], float32: only these are unpacked."""
        wanted, groups = ids.reshape(-1), -(-self.columns // GROUP)
        if self.codes.shape[0] == self.rows * groups:  # nothing is left out
            codes, scale, zero = (None if t is None else t.view(self.rows, groups, -1)[wanted].flatten(0, 1) for t in (self.codes, self.scale, self.zero))
            values = reference.values_of(codes, scale[:, 0], None if zero is None else zero[:, 0], self.bits)  # type: ignore[arg-type, index]
            return values.view(-1, groups * GROUP)[:, : self.columns].view(*ids.shape, self.columns)
        mask = mask_of(self.present[wanted], groups)
        at = (self.start[wanted][:, None] + mask.cumsum(1) - 1)[mask]
        rows = torch.zeros(*mask.shape, GROUP, device=self.codes.device)
        rows[mask] = reference.values_of(self.codes[at], self.scale[at], None if self.zero is None else self.zero[at], self.bits)
        return rows.flatten(1)[:, : self.columns].view(*ids.shape, self.columns)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``y = x W^T + b``: x [..., I] -> y [..., O].

        Few rows of x are rounded to 8 bits in groups of 32 (`reference.rounded`), as llama.cpp does; more are not.
        """
        return product(self, x, bias, FEW)

    kind = "grouped"

    def arguments(self) -> tuple[int, ...]:
        """What the native side takes a matrix of this kind by."""
        matrix = (pointer(self.codes), pointer(self.scale), pointer(self.zero), pointer(self.skips), pointer(self.start))
        return *matrix, self.codes.shape[0], self.rows, self.columns, self.bits
