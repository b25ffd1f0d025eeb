"""The specification, in PyTorch: how codes lie, and the matrix that they mean. The product is that of `rarefy.kernels.grouped`."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.kernels.grouped.reference import GROUP

HEIGHT = {4: 64, 8: 32}  # {bits: rows of a strip}, which are 32 bytes a column
PANEL = 32  # strips whose bytes of a column are one run


def strips(rows: int, bits: int) -> int:
    """How many strips hold the rows.

    >>> strips(65, 4), strips(65, 8)
    (2, 3)
    """
    return -(-rows // HEIGHT[bits])


def columns_of(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [strips * height, G * 32] as they are stored, uint8 [G, strips * 1024]: panel by panel of each group, column by column, strip by strip.

    >>> first = columns_of(torch.arange(64, dtype=torch.uint8)[:, None].expand(64, 32), 8)[0, :20]
    >>> first.tolist()
    [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27, 4, 5, 6, 7]
    """
    groups = codes.shape[1] // GROUP
    halves = codes.view(-1, HEIGHT[bits] // 32, 4, 2, 4, groups, GROUP).permute(5, 6, 0, 1, 3, 2, 4).reshape(groups, GROUP, -1, HEIGHT[bits] // 32, 32)
    by_strip = halves[:, :, :, 0] if bits == 8 else halves[:, :, :, 0] | halves[:, :, :, 1] << 4
    return torch.cat([panel.flatten(1) for panel in by_strip.split(PANEL, 2)], 1)


def codes_of(stored: Tensor, bits: int) -> Tensor:
    """Codes uint8 [strips * height, G * 32] of what is stored: `columns_of` backwards."""
    groups = stored.shape[0]
    panels = [panel.view(groups, GROUP, -1, 32) for panel in stored.split(PANEL * GROUP * 32, 1)]
    by_strip = torch.cat(panels, 2)
    halves = by_strip[:, :, :, None] if bits == 8 else torch.stack([by_strip & 15, by_strip >> 4], 3)
    return halves.unflatten(4, (2, 4, 4)).permute(2, 3, 5, 4, 6, 0, 1).reshape(-1, groups * GROUP)


def unpack(stored: Tensor, scale: Tensor, zero: Tensor | None, shape: tuple[int, int], bits: int) -> Tensor:
    """The dense float32 matrix [O, I]: ``w = scale * code + zero``; scale and zero are float16 [G, strips * height]."""
    codes = codes_of(stored, bits)[: shape[0], : shape[1]].float()
    by, plus = (None if t is None else t.float().t()[: shape[0]].repeat_interleave(GROUP, 1)[:, : shape[1]] for t in (scale, zero))
    assert by is not None
    return by * (codes - 2 ** (bits - 1)) if plus is None else by * codes + plus
