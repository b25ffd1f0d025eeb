"""A bank of gated experts of different widths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.core.errors import BadInput
from rarefy.core.roles import Bank
from rarefy.experts.split import Expert, Split


class Ragged(Bank):
    """Run expert e, of its own inner width D_e, as ``down_e (silu(gate_e x) * up_e x)``.

    Experts lie one after the other without padding: gate_proj and up_proj [sum D, H], down_proj [sum D, H]; rows [n, H] -> [n, H].
    `widths` [E] is what balance losses by size read.

    Raises:
        BadInput: no experts, or one without width.

    >>> bank = Ragged([2, 6], 4)
    >>> [p.shape[0] for p in bank.parameters()], bank.widths.tolist()
    ([8, 8, 8], [2, 6])
    """

    widths: Tensor

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls([2, 4, 5, 9], 8), cls([3], 8))

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise BadInput(f"experts of widths {list(widths)}", "every expert has an inner width of one or more")
        self.experts, self._sizes, total = len(widths), list(widths), sum(widths)
        self.register_buffer("widths", torch.tensor(self._sizes), persistent=False)
        self.gate_proj, self.up_proj = (nn.Parameter(torch.randn(total, width) / width**0.5) for _ in range(2))
        root = torch.tensor(self._sizes).repeat_interleave(torch.tensor(self._sizes)).sqrt()
        self.down_proj = nn.Parameter(torch.randn(total, width) / root[:, None])

    def split(self) -> Split:
        """One function [n, H] -> [n, H] per expert."""
        gates, ups, downs = (p.split(self._sizes) for p in (self.gate_proj, self.up_proj, self.down_proj))

        def expert(e: int) -> Expert:
            gate, up, down = gates[e], ups[e], downs[e]
            return lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down.T)

        return Split(self.experts, expert)

    def each(self, x: Tensor, expert: Tensor) -> Tensor:
        """Row n [H] through expert[n]: every expert's rows at once, in the order of the rows."""
        outs, order = [run(x[expert == e]) for e, run in enumerate(self.split())], expert.argsort(stable=True)
        together = torch.cat(outs)
        return together.new_zeros(x.shape).index_copy(0, order, together)


def arithmetic(experts: int, inner: int, spread: float = 0.4375) -> list[int]:
    """Widths in equal steps around `inner`, from ``1 - spread`` to ``1 + spread`` of it; together they are exactly E times `inner`.

    The default is the paper's best: 2304, 2816, ..., 5888 around 4096. Source: Wang et al., HMoE, arXiv 2408.10681.

    >>> arithmetic(8, 4096)
    [2304, 2816, 3328, 3840, 4352, 4864, 5376, 5888]
    >>> sum(arithmetic(3, 7)), arithmetic(1, 5)
    (21, [5])
    """
    steps = [1 + spread * (2 * e / (experts - 1) - 1) if experts > 1 else 1.0 for e in range(experts)]
    ends = [0, *(round(inner * sum(steps[: e + 1])) for e in range(experts))]
    return [max(1, last - first) for first, last in pairwise(ends)]


def ragged(experts: int, width: int, inner: int) -> Ragged:
    """Gated experts whose widths are `arithmetic`, as many parameters as equally wide ones have."""
    return Ragged(arithmetic(experts, inner), width)
