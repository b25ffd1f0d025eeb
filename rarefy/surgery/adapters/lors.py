"""LoRS: a low-rank change under the mask that keeps neither mask nor product for backward, and starts where the gradient points."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rarefy.core.attach import Map
from rarefy.core.records import Paper
from rarefy.core.roles import View
from rarefy.surgery.adapters import Adaptation, added


class _Lean(torch.autograd.Function):
    """``y = x W'^T + b``, saving x, W, A and B alone; W' is made again in backward for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, exact: bool) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale, ctx.exact = scale, exact
        return nn.functional.linear(x, added(weight, scale * (a @ b)).to(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, a, b = ctx.saved_tensors
        rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = (g @ added(weight, ctx.scale * (a @ b)).to(g.dtype)).view_as(x) if ctx.needs_input_grad[0] else None
        grad_w = (g.T @ rows) * (weight != 0) if ctx.needs_input_grad[1] else None
        grad_bias = g.sum(0) if ctx.needs_input_grad[2] else None
        grads = _exact(rows, g, weight, a, b, ctx.scale) if ctx.exact else _mask_free(rows, g, a, b)
        return grad_x, grad_w, grad_bias, *grads, None, None


def _mask_free(x: Tensor, g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``dA = g^T (x B^T)``, ``dB = (g A)^T x``: O(N r (O + I)), nothing of shape [O, I]."""
    return (g.T @ (x @ b.T.to(x.dtype))).to(a.dtype), ((g @ a.to(g.dtype)).T @ x).to(b.dtype)


def _exact(x: Tensor, g: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``G = s (g^T x)`` where W is not zero, ``dA = G B^T``, ``dB = A^T G``."""
    change = scale * (g.T @ x).to(a.dtype) * (weight != 0)
    return change @ b.T, a.T @ change


class LeanLowRank(View):
    """A low-rank change on the kept weights whose backward keeps nothing of the weight's size but the weight.

    ``W' = W + s A B`` where W is not zero; A [O, r], B [r, I]. `op` saves x, W, A and B; the mask is W != 0 and is never
    stored. Unless `exact`, the gradients of A and B ignore mask and s (straight through): ``dA = g^T (x B^T)``, ``dB = (g A)^T x``.
    Called without `op` (a shadowed host), the gradient is autograd's, which is exact.

    >>> view = LeanLowRank(torch.ones(1, 1), torch.ones(1, 2), 2.0); view(torch.tensor([[0.0, 1.0]])).tolist()
    [[0.0, 3.0]]
    """

    @classmethod
    def examples(cls) -> tuple[LeanLowRank, ...]:
        g = torch.Generator().manual_seed(0)
        return tuple(cls(torch.randn(6, r, generator=g), torch.randn(r, 8, generator=g), 0.5, exact) for r in (1, 3) for exact in (False, True))

    def __init__(self, a: Tensor, b: Tensor, scale: float, exact: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.scale, self.exact = nn.Parameter(a), nn.Parameter(b), scale, exact

    def forward(self, weight: Tensor) -> Tensor:
        return added(weight, self.scale * (self.a @ self.b))

    def op(self, fn: Map, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _Lean.apply(x, weight, bias, self.a, self.b, self.scale, self.exact)


@dataclass(frozen=True)
class Lors(Adaptation):
    """Low-rank adaptation of a sparse model at the memory of an unmasked one.

    A is zero, and the rows of B are the top r right singular vectors of the mean dense gradient over gamma, so that the
    model is unchanged at the start and the first gradient of A has the most energy a rank r can have; ``s = alpha / sqrt(r)``.

    `exact`: the true gradient under the mask, at the cost of forming [O, I] in backward.

    Source: the authors' code, github.com/hyx1999/LoRS, and arXiv 2501.08582.

    >>> weight, gradient = torch.randn(6, 8), torch.randn(6, 8)
    >>> view = Lors(rank=2).view(weight, generator=torch.Generator(), gradient=gradient)
    >>> torch.equal(view(weight), weight)
    True
    """

    rank: int = 16
    alpha: float = 16.0
    gamma: float = 1.0
    exact: bool = False
    lr: float = 1e-4
    name = "lors"
    paper = Paper(
        "lors",
        "LoRS: Efficient Low-Rank Adaptation for Sparse Large Language Model",
        "arXiv 2501.08582",
        (
            "the gradients of A and B ignore the mask and the factor s, as in the authors' code; exact=True gives the true ones",
            "learned tensors are float32 also for a bf16 model",
            "next-token loss on plain text instead of instruction data",
        ),
    )

    def view(self, weight: Tensor, *, generator: Generator, gradient: Tensor) -> LeanLowRank:
        rank = min(self.rank, *weight.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            *_, right = torch.svd_lowrank(gradient.float().cpu(), q=min(4 * rank, *weight.shape), niter=4)
        b = (right[:, :rank].T / self.gamma).contiguous().to(weight.device)
        return LeanLowRank(torch.zeros(weight.shape[0], rank, device=weight.device), b, self.alpha / math.sqrt(rank), self.exact)
