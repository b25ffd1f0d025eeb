"""Q-Sparse: k activations for every matrix, and a gradient that no layer of masks makes vanish."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.activations.apply import apply_gating
from rarefy.activations.gates.topk import TopK
from rarefy.activations.gates.topk_ste import StraightTopK
from rarefy.activations.gatings.q_sparse import Q_SPARSE
from rarefy.core.errors import BadInput
from rarefy.core.roles import Gate
from rarefy.tasks.squared_relu_lm import SquaredReluLM
from tests.evidence import check

NAME = "k of every token, a weight gradient of the masked input, an input gradient without a mask, and more of it at the first layer"


def first_gradient(gate: type[Gate]) -> float:
    """Norm of the gradient of the first block's `up` in a net of 6 blocks, half of the activations zero."""
    task = SquaredReluLM(width=32)
    model, batch = task.model(0), task.batch(0, 0)
    apply_gating(model, replace(Q_SPARSE, parts=((Q_SPARSE.parts[0][0], gate),), density=0.5), [batch[0]], [batch[0]])
    task.loss(model, batch).backward()
    (embed,) = model.embed.parameters()  # type: ignore[union-attr, operator]
    assert embed.grad is not None
    return float(model.blocks[0].up.weight.grad.norm())  # type: ignore[union-attr, index, operator]


def holds(gate: type[Gate]) -> None:
    x, w = torch.randn(6, 10, requires_grad=True), torch.randn(4, 10, requires_grad=True)
    upstream, part = torch.randn(6, 4), gate(0.3)
    y = part(x)
    assert torch.equal(y, TopK(0.3)(x)) and (y != 0).sum(-1).tolist() == [3] * 6
    F.linear(y, w).backward(upstream)
    torch.testing.assert_close(w.grad, upstream.T @ TopK(0.3)(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, upstream @ w, rtol=1e-6, atol=1e-6)
    assert first_gradient(gate) > first_gradient(TopK)


class DenseInForward(StraightTopK):
    """The weight learns from activations that it never sees."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@check("q-sparse", NAME, kind="method")
def test_q_sparse() -> None:
    holds(StraightTopK)


@pytest.mark.parametrize("twin", [TopK, DenseInForward])
def test_with_a_masked_gradient_or_no_mask_it_fails(twin: type[Gate]) -> None:
    with pytest.raises(AssertionError):
        holds(twin)


def test_blocks_keep_k_each_and_must_be_whole() -> None:
    x = torch.randn(5, 24)
    assert (StraightTopK(0.5, block=8)(x).view(5, 3, 8) != 0).sum(-1).eq(4).all()
    assert torch.equal(StraightTopK(0.5, block=24)(x), StraightTopK(0.5)(x))
    with pytest.raises(BadInput, match="24 activations in blocks of 7"):
        StraightTopK(0.5, block=7)(x)
    with pytest.raises(BadInput, match="block -1"):
        StraightTopK(0.5, block=-1)
    with pytest.raises(BadInput, match="density 2"):
        StraightTopK(2.0)


def test_it_compiles_without_a_break() -> None:
    gate, x = StraightTopK(0.5), torch.randn(3, 8)
    assert torch.equal(torch.compile(gate, fullgraph=True, backend="eager")(x), gate(x))
