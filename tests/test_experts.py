"""Dispatch against a dense sum, its back ends against each other, the trace's doors, and transformers' experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Context, Routing, Scores
from rarefy.core.trace import Trace
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.banks.glu import GLU
from rarefy.experts.dispatch import Backend, dispatch, gather, loop
from rarefy.experts.moe import MoE
from rarefy.experts.overflow.capacity import Capacity
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.switch import Switch
from rarefy.experts.routers.topk import TopK
from rarefy.experts.routing import dense


def grads(x: Tensor, routing: Routing, bank: GLU, backend: Backend | None) -> list[Tensor]:
    x, w = x.clone().requires_grad_(), routing.weight.clone().requires_grad_()
    bank.zero_grad()
    r = Routing(routing.expert, w, routing.items, routing.experts, routing.k)
    y = dispatch(x, r, bank, backend=backend) if backend else sum((dense(r)[:, [e]] * f(x) for e, f in enumerate(bank.split())), torch.zeros_like(x))
    (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
    return [y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in (x, w, bank.gate_up_proj, bank.down_proj))]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(0, 9), experts=st.integers(1, 6), k=st.integers(1, 4))
def test_back_ends_equal_the_dense_sum(seed: int, rows: int, experts: int, k: int) -> None:
    g = torch.Generator().manual_seed(seed)
    expert = torch.randint(0, experts + 1, (rows * k,), generator=g)
    routing = Routing(expert, torch.rand(rows * k, generator=g), rows, experts, k)
    bank, x = GLU(experts, 4, 3), torch.randn(rows, 4, generator=g)
    expected = grads(x, routing, bank, None)
    for backend in (loop, gather):
        for got, want in zip(grads(x, routing, bank, backend), expected, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def layer() -> MoE:
    torch.manual_seed(0)
    return MoE(Linear(4, 3), TopK(2), GLU(3, 4, 5), Capacity(1.0, 3.0))


def test_nobody_live_gives_zeros() -> None:
    y = layer()(torch.randn(5, 4), Context(live=torch.zeros(3, dtype=torch.bool)))
    assert torch.equal(y, torch.zeros(5, 4))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_an_empty_batch_keeps_its_shape_and_has_gradients(shape: tuple[int, ...]) -> None:
    moe = layer()
    y = moe(torch.zeros(shape))
    assert y.shape == shape
    y.sum().backward()
    assert moe.bank.down_proj.grad is not None and not moe.bank.down_proj.grad.any()


@pytest.mark.parametrize("experts", [4, 16, 64, 300])
def test_equals_are_chosen_by_lower_index(experts: int) -> None:
    scores = Scores(torch.zeros(2, experts))
    assert TopK(2)(scores, Context()).expert.tolist() == [0, 1, 0, 1]
    assert Switch()(scores, Context()).expert.tolist() == [0, 0]


@pytest.mark.parametrize("k", [0, 4])
def test_k_beyond_the_experts_is_refused(k: int) -> None:
    with pytest.raises(BadInput, match=f"k = {k} with 3 experts"):
        TopK(k)(Scores(torch.zeros(1, 3)), Context())


@pytest.mark.parametrize("choice", [Switch(), TopK(2)])
def test_padding_takes_no_capacity_and_is_invisible_to_the_balance_loss(choice: Switch | TopK) -> None:
    torch.manual_seed(0)
    moe, x = MoE(Linear(4, 3), choice, GLU(3, 4, 5), Capacity(0.25)), torch.randn(12, 4)
    valid = torch.arange(24) >= 12
    seen = []
    for padding in (torch.randn(12, 4), x[:1].repeat(12, 1), -x[:1].repeat(12, 1)):
        with Trace(moe) as trace:
            y = moe(torch.cat([padding, x]), Context(valid=valid))
        (entry,) = trace.entries
        assert entry.routing.dropped is not None and entry.routing.dropped.sum() > 0
        seen.append((y[12:], LoadBalance()(entry), entry.routing.dropped))
    for other in seen[1:]:
        for got, want in zip(other, seen[0], strict=True):
            torch.testing.assert_close(got, want)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), factor=st.sampled_from([0.5, 1.0, 1.1, 3.0]))
def test_capacity_is_exact_and_reports(seed: int, factor: float) -> None:
    expert = torch.randint(0, 3, (20,), generator=torch.Generator().manual_seed(seed))
    before = Routing(expert, torch.ones(20), 10, 3, 2)
    after = Capacity(factor)(before, Context(training=True))
    limit = Capacity(factor).limit(20, 3, True)
    assert after.dropped is not None
    assert torch.equal(after.counts(), before.counts().clamp(max=limit))
    assert torch.equal(after.counts() + after.dropped, before.counts())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.moe, self.reentrant = layer(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.moe, x, use_reentrant=self.reentrant)
        return out


def test_trace_records_each_call_once_under_checkpointing() -> None:
    model, x = Checkpointed(False), torch.randn(6, 4, requires_grad=True)
    with Trace(model, rows=True) as trace:
        (model(x).sum() + model(x).sum()).backward()
    assert [(e.path, e.call) for e in trace.entries] == [("moe", 0), ("moe", 1)]
    assert trace.entries[0].x is not None


def test_trace_refuses_reentrant_checkpointing_and_silence() -> None:
    model = Checkpointed(True)
    with pytest.raises(Refused), Trace(model):
        model(torch.randn(6, 4, requires_grad=True))
    with Trace(model) as trace, torch.no_grad():
        model.moe(torch.randn(6, 4))
    assert len(trace.entries) == 1
    with pytest.raises(BadInput), Trace(model):
        pass
    with pytest.raises(BadInput), Trace(nn.Linear(1, 1)):
        pass


def mixtral() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM._from_config(config, experts_implementation="eager")


@pytest.mark.parametrize("tokens", [1, 13])
def test_mixtral_equals_eager(tokens: int) -> None:
    from rarefy.hub.experts import use_experts

    eager = mixtral()
    ours = copy.deepcopy(eager)
    for mine, theirs in zip(ours.modules(), eager.modules(), strict=True):
        if hasattr(theirs, "config"):
            mine.config = theirs.config
    use_experts(ours)
    assert eager.config._experts_implementation == "eager"
    ids = torch.arange(tokens)[None] % 32
    outs = [m(ids).logits for m in (eager, ours)]
    torch.testing.assert_close(outs[1], outs[0], atol=1e-6, rtol=1e-6)
    for out in outs:
        out.square().sum().backward()
    for a, b in zip(eager.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-6, rtol=1e-5)


def test_hub_experts_run_through_our_dispatch_and_take_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from rarefy.hub import experts as ours

    model = ours.use_experts(mixtral())
    module: Any = next(m for m in model.modules() if hasattr(m, "is_transposed"))
    seen: list[int] = []

    def spy(x: Tensor, routing: Routing, bank: Any) -> Tensor:
        seen.append(len(x))
        return dispatch(x, routing, bank)

    monkeypatch.setattr(ours, "dispatch", spy)
    y = module(torch.zeros(0, 16), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert y.shape == (0, 16) and seen == [0]
    with pytest.raises(BadInput):
        ours.use_experts(nn.Linear(1, 1))


def test_transposed_biased_experts_with_their_own_gate_equal_eager() -> None:
    from rarefy.hub.experts import use_experts

    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "head_dim": 8}
    config = transformers.GptOssConfig(**small, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)
    eager: Any = transformers.GptOssForCausalLM._from_config(config, experts_implementation="eager")
    for parameter in eager.parameters():  # biases start at zero
        nn.init.normal_(parameter, std=0.2)
    for tokens in (1, 9):
        ids = torch.arange(tokens)[None]
        torch.testing.assert_close(use_experts(copy.deepcopy(eager))(ids).logits, eager(ids).logits, atol=1e-5, rtol=1e-5)
