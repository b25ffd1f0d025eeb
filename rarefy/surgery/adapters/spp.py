"""SPP: the change is a multiple of the sparse weight, so that every pattern survives by itself."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from rarefy.core.attach import Map
from rarefy.core.records import Paper
from rarefy.core.roles import View
from rarefy.surgery.adapters import Adaptation


class RowBlockProduct(View):
    """Multiply a weight by one plus a learned row vector per block of rows times a learned column.

    ``W' = W * (1 + s R(A) * B)``; A [r, I] is spread over r blocks of neighbouring rows, ``R(A)_i = A[floor(i r / O)]``;
    B [O, 1]. `op` computes the same without R(A) and W': ``y = x W^T + s B * concat_k((A_k * drop(x)) W_k^T)``, dropout
    on the learned branch only.

    >>> view = RowBlockProduct(torch.tensor([[1.0], [2.0]]), torch.ones(4, 1), 1.0)
    >>> view(torch.tensor([[1.0], [1.0], [1.0], [0.0]])).flatten().tolist()
    [2.0, 2.0, 3.0, 0.0]
    """

    @classmethod
    def examples(cls) -> tuple[RowBlockProduct, ...]:
        rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
        return tuple(cls(rows[:r].clone(), torch.zeros(6, 1), 2.0) for r in (1, 3))

    def __init__(self, rows: Tensor, column: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.rows, self.column, self.scale, self.dropout = nn.Parameter(rows), nn.Parameter(column), scale, dropout
        count, rank = column.shape[0], rows.shape[0]
        ends = [-(-k * count // rank) for k in range(rank + 1)]  # of the blocks of floor(i r / O)
        self.sizes = [end - begin for begin, end in itertools.pairwise(ends)]

    def forward(self, weight: Tensor) -> Tensor:
        spread = self.rows.repeat_interleave(torch.tensor(self.sizes, device=weight.device), 0)
        return (weight * (1.0 + self.scale * spread * self.column)).to(weight.dtype)

    def op(self, fn: Map, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen = F.dropout(x, self.dropout, self.training)
        blocks = [F.linear((seen * row).to(x.dtype), block) for row, block in zip(self.rows, weight.split(self.sizes), strict=True)]
        return fn(x, weight, bias) + (self.scale * self.column.view(-1) * torch.cat(blocks, -1)).to(x.dtype)


@dataclass(frozen=True)
class Spp(Adaptation):
    """Sparsity-preserved parameter-efficient fine-tuning: r * I + O learned numbers for a matrix [O, I].

    A is Kaiming-uniform, B zero: the model is unchanged at the start, bit for bit. `scale` is s.

    Source: Lu et al., SPP, arXiv 2405.16057, and the authors' code (their r is 16 everywhere, their s is 16 / 8). The code needs r to divide O; here row i belongs to block floor(i r / O), which is the same where it does.

    >>> weight = torch.randn(8, 4)
    >>> torch.equal(Spp(rank=4).view(weight, generator=torch.Generator())(weight), weight)
    True
    """

    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.05
    lr: float = 4e-3
    name = "spp"
    paper = Paper(
        "spp",
        "SPP: Sparsity-Preserved Parameter-Efficient Fine-Tuning for Large Language Models",
        "arXiv 2405.16057",
        (
            "r need not divide the rows: row i is in block floor(i r / O)",
            "learned tensors are float32 also for a bf16 model",
            "next-token loss on plain text instead of instruction data",
        ),
    )

    def view(self, weight: Tensor, *, generator: Generator) -> RowBlockProduct:
        count, columns = weight.shape
        rows = nn.init.kaiming_uniform_(torch.empty(min(self.rank, count), columns), a=math.sqrt(5), generator=generator)
        return RowBlockProduct(rows.to(weight.device), torch.zeros(count, 1, device=weight.device), self.scale, self.dropout)
