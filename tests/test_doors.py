"""The two doors as a product: {plain, checkpointed, reentrant} x {eager, fullgraph} x {two forwards, generate} x {empty, nobody live}."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rarefy.core.ambient import Ambient, Seat
from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Context, Routing, Scores
from rarefy.core.roles import Affinity
from rarefy.core.trace import Trace
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.banks.glu import GLU
from rarefy.experts.moe import MoE
from rarefy.experts.overflow.capacity import Capacity
from rarefy.experts.overflow.training_only import TrainingOnly
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.switch import Switch
from rarefy.experts.routers.topk import TopK

CHOICES = [Switch(), TopK(2)]
SIDE_EFFECTS = "skip_fwd_side_effects_in_bwd_under_checkpoint"
Options = Callable[[Ambient], dict[str, Any]]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class ByToken(Affinity):
    """Logits that need the token's id and its place, so that a lost or stale context changes every result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = Linear(8, 4), nn.Embedding(16, 4)

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        scores: Scores = self.linear(x, context, bank)
        if context.ids is None or context.positions is None:
            raise AssertionError("the context did not arrive")
        return Scores(scores.logits + 2 * self.table(context.ids) + context.positions[:, None].cos())


class Host(nn.Module):
    """Two layers called with hidden states only; each under `checkpoint(**self.options)` where those are set."""

    def __init__(self, choice: Switch | TopK) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.moe = nn.ModuleList(MoE(ByToken(), choice, GLU(4, 8, 6), Capacity(1.0, 4.0)) for _ in range(2))
        self.options: dict[str, Any] | None = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h: Tensor = self.embed(input_ids)
        for layer in self.moe:
            h = h + (layer(h) if self.options is None else checkpoint(layer, h, **self.options))
        return h


IDS = torch.arange(12).view(2, 6)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def build(choice: Switch | TopK, options: Options | None = None) -> tuple[Host, Ambient]:
    host = Host(choice)
    ambient = Ambient.attach(host)
    host.options = None if options is None else options(ambient)
    return host, ambient


def compiled(host: nn.Module, backend: str = "aot_eager") -> Any:
    return torch.compile(host, backend=backend, fullgraph=True)


def two_forwards(host: nn.Module, call: Callable[..., Tensor]) -> list[Tensor]:
    """Two different traced batches, their losses summed, one backward: loss, entries, and every gradient."""
    with Trace(host) as trace:
        loss = call(IDS, attention_mask=MASK).sin().sum() + call(IDS.flip(1), attention_mask=MASK.flip(0)).cos().sum()
        loss = loss + torch.stack([LoadBalance(1.0)(e) for e in trace.entries]).sum()
        loss.backward()
    paths = [(e.path, e.call) for e in trace.entries]
    assert paths == [("moe.0", 0), ("moe.1", 0), ("moe.0", 1), ("moe.1", 1)]
    return [loss.detach(), *(p.grad.clone() for p in host.parameters() if p.grad is not None)]


def same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def replayed(ambient: Ambient) -> dict[str, Any]:
    return {"use_reentrant": False, "context_fn": ambient.replay}


def bare(ambient: Ambient) -> dict[str, Any]:
    return {"use_reentrant": False}


def reentrant(ambient: Ambient) -> dict[str, Any]:
    return {"use_reentrant": True}


def separate_backwards(choice: Switch | TopK) -> list[Tensor]:
    """The oracle for two forwards: each with its own context given by hand, its own backward, gradients added up."""
    host, _ = build(choice)
    losses = []
    for ids, mask, f in ((IDS, MASK, Tensor.sin), (IDS.flip(1), MASK.flip(0), Tensor.cos)):
        positions = (mask.cumsum(1) - 1).clamp(min=0).reshape(-1)
        context = Context(ids=ids.reshape(-1), valid=mask.bool().reshape(-1), positions=positions)
        h, total = host.embed(ids), torch.zeros(())
        for layer in host.moe:
            with Trace(layer) as trace:
                h = h + layer(h, context)
            total = total + LoadBalance(1.0)(trace.entries[0])
        total = total + f(h).sum()
        total.backward()
        losses.append(total.detach())
    return [torch.stack(losses).sum(), *(p.grad.clone() for p in host.parameters() if p.grad is not None)]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: c.name)
def test_two_forwards_before_one_backward_are_exact(choice: Switch | TopK) -> None:
    want = separate_backwards(choice)
    assert len(want) == 1 + sum(1 for _ in Host(choice).parameters())
    for options in (None, replayed):
        host, _ = build(choice, options)
        same(two_forwards(host, host), want)
    host, _ = build(choice)
    same(two_forwards(host, compiled(host)), want)


def test_jitter_is_replayed_too() -> None:
    found = []
    for options in (None, replayed):
        host, _ = build(TopK(2), options)
        for layer in host.moe:
            layer.affinity.linear.jitter = 0.5
        torch.manual_seed(1)
        found.append(two_forwards(host, host))
    same(found[1], found[0])
    host, _ = build(TopK(2))
    assert not torch.equal(two_forwards(host, host)[0], found[0][0])


@pytest.mark.parametrize("options", [bare, reentrant])
def test_a_compiled_checkpoint_is_exact_once_records_may_leave_it(options: Options) -> None:
    """The compiler recomputes the graph with its inputs: nothing to replay, and reentrant has no meaning there."""
    if not hasattr(torch._dynamo.config, SIDE_EFFECTS):
        pytest.skip(f"this torch has no {SIDE_EFFECTS}")
    host, _ = build(TopK(2), options)
    with torch._dynamo.config.patch(**{SIDE_EFFECTS: True}):
        same(two_forwards(host, compiled(host)), separate_backwards(TopK(2)))


@pytest.mark.parametrize("options", [bare, reentrant])
def test_a_trace_through_a_compiled_checkpoint_is_refused_as_configured(options: Options) -> None:
    host, _ = build(Switch(), options)
    with pytest.raises(Refused, match=SIDE_EFFECTS):
        two_forwards(host, compiled(host))


def test_context_fn_in_a_compiled_checkpoint_is_refused() -> None:
    host, _ = build(Switch(), replayed)
    with pytest.raises(Refused, match="leave context_fn out when compiling"):
        two_forwards(host, compiled(host))


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: c.name)
def test_eager_checkpoints_that_would_be_silently_wrong_are_refused(choice: Switch | TopK) -> None:
    host, _ = build(choice, reentrant)
    with pytest.raises(Refused, match="use_reentrant=False"):
        two_forwards(host, host)
    for options in (bare, reentrant):  # untraced: the recomputation would see no context, or that of another forward
        host, _ = build(choice, options)
        with pytest.raises(Refused, match=r"context_fn=ambient\.replay"):
            (host(IDS, attention_mask=MASK).sum() + host(IDS.flip(1)).sum()).backward()


def test_a_compiled_checkpoint_without_a_trace_needs_nothing() -> None:
    grads = []
    for options in (None, bare):
        torch._dynamo.reset()
        host, _ = build(TopK(2), options)
        call = compiled(host) if options else host
        (call(IDS, attention_mask=MASK).sin().sum() + call(IDS.flip(1), attention_mask=MASK.flip(0)).cos().sum()).backward()
        grads.append([p.grad.clone() for p in host.parameters() if p.grad is not None])
    same(grads[1], grads[0])


def test_a_compiled_model_may_be_traced_at_any_time_without_compiling_anew() -> None:
    host, _ = build(TopK(2))
    call = compiled(host)
    call(IDS, attention_mask=MASK)
    for opened in range(3):
        with Trace(host) as trace:
            for _ in range(12):
                call(IDS, attention_mask=MASK)
        assert len(trace.entries) == 24, opened
        if opened == 0:
            seen = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == seen


@pytest.mark.parametrize("call", [lambda host: host, compiled], ids=["eager", "fullgraph"])
@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: c.name)
def test_empty_batches_and_nobody_live(choice: Switch | TopK, call: Callable[[Host], Callable[..., Tensor]]) -> None:
    host, ambient = build(choice)
    run = call(host)
    for ids in (torch.zeros(0, 6, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)):
        host.zero_grad()
        with Trace(host) as trace:
            y = run(ids, attention_mask=torch.ones_like(ids))
        assert y.shape == (*ids.shape, 8) and len(trace.entries) == 2
        assert [LoadBalance()(e).item() for e in trace.entries] == [0.0, 0.0]
        y.sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in host.parameters())
    with ambient.given(live=torch.zeros(4, dtype=torch.bool)), Trace(host) as trace:
        y = run(IDS, attention_mask=MASK)
        (y.sum() + torch.stack([LoadBalance()(e) for e in trace.entries]).sum()).backward()
    assert torch.equal(y, host.embed(IDS))
    assert [e.routing.counts().sum().item() for e in trace.entries] == [0, 0]
    assert all(torch.isfinite(p.grad).all() for p in host.parameters() if p.grad is not None)


def test_live_experts_per_layer() -> None:
    host, ambient = build(TopK(2))
    live = torch.tensor([True, False, True, False])
    with ambient.given(live={"moe.1": live}), Trace(host) as trace:
        host(IDS)
    used = [set(e.routing.expert.tolist()) - {4} for e in trace.entries]
    assert used[1] <= {0, 2} and used[0] - {0, 2}


def greedy(call: Callable[..., Tensor], ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Generation with a cache: after the prompt one new token per call, while the mask covers the past."""
    new = ids
    for _ in range(steps):
        new = call(new, attention_mask=mask)[:, -1, :4].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return ids


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: c.name)
def test_generate_sees_the_last_columns_of_the_mask(choice: Switch | TopK) -> None:
    host, _ = build(choice)
    host.eval()
    with torch.no_grad(), Trace(host) as trace:
        want = greedy(host, IDS, MASK, 4)
    first, last = trace.entries[0].context, trace.entries[-1].context
    assert first.valid is not None and first.valid.tolist() == MASK.bool().reshape(-1).tolist()
    assert last.valid is not None and last.valid.tolist() == [True, True] and last.owner is not None and last.owner.tolist() == [0, 1]
    assert last.positions is not None and last.positions.tolist() == [6, 8] and last.ids is not None and torch.equal(last.ids, want[:, -2])
    with torch.no_grad():
        assert torch.equal(greedy(compiled(host), IDS, MASK, 4), want)
        host.options = {"use_reentrant": True}  # nothing is recomputed without a backward: nothing to refuse
        assert torch.equal(greedy(host, IDS, MASK, 4), want)


def inductor() -> str:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler")
    return "inductor"


def test_a_compiled_function_around_the_model_traces_its_hooks_too() -> None:
    host, _ = build(TopK(2))

    def step(ids: Tensor, mask: Tensor) -> Tensor:
        return host(ids, attention_mask=mask).sin().sum()

    call: Any = torch.compile(step, backend="aot_eager", fullgraph=True)
    for ids, mask in ((IDS, MASK), (IDS.flip(1), MASK.flip(0))):
        with Trace(host) as trace:
            assert torch.equal(call(ids, mask), step(ids, mask))
        valid = [e.context.valid for e in trace.entries]
        assert len(valid) == 4 and all(v is not None and torch.equal(v, mask.bool().reshape(-1)) for v in valid)
        assert host.moe[0].seat() == Context()


def test_inductor_agrees() -> None:
    moe = layer(Switch())
    x = torch.randn(5, 8)
    with torch.no_grad(), Trace(moe) as trace:
        got, want = compiled(moe, inductor())(x), moe(x)
    torch.testing.assert_close(got, want)
    assert torch.equal(trace.entries[0].routing.expert, trace.entries[1].routing.expert)


# ---------------------------------------------------------------- the ambient alone


def layer(choice: Switch | TopK | None = None, **parts: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(Linear(8, 4), choice or TopK(2), GLU(4, 8, 6), **parts)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.moe = nn.Embedding(16, 8), layer()

    def forward(self, input_ids: Tensor | None = None, **given: Any) -> Tensor:
        x = given["inputs_embeds"] if input_ids is None else self.embed(input_ids)
        out: Tensor = self.moe(x)
        return out


def seen(model: nn.Module, *args: Any, **kwargs: Any) -> Context:
    with Trace(model) as trace:
        model(*args, **kwargs)
    return trace.entries[-1].context


def test_models_copies_and_threads_do_not_share() -> None:
    one, two = Plain(), Plain()
    ambient = Ambient.attach(one)
    assert seen(two, IDS).ids is None
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert other.moe.seat.ambient is not ambient
        with ambient.given(labels=torch.zeros(2)):
            context = seen(other, IDS)
        assert context.labels is None and context.ids is not None
    found: dict[str, Context] = {}
    inside, done = threading.Event(), threading.Event()

    def other_thread() -> None:
        inside.wait(10)
        found["other"] = one.moe.seat()
        done.set()

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            done.wait(10)
            found["mine"] = one.moe.seat()
            return x

    thread = threading.Thread(target=other_thread)
    thread.start()
    one.embed = nn.Sequential(one.embed, Waits())
    with ambient.given(labels=torch.zeros(2)):
        one(IDS)
    thread.join()
    assert found["mine"].ids is not None and found["mine"].labels is not None
    assert found["other"].ids is None and found["other"].labels is None


def test_nothing_stays_after_a_call_even_one_that_fails() -> None:
    model = Plain()
    ambient = Ambient.attach(model)
    with pytest.raises(KeyError):
        model(input_ids=None, wrong=1)
    model(IDS)
    assert model.moe.seat() == Context()
    assert list(model.state_dict()) == list(Plain().state_dict())
    ambient.detach()
    assert seen(model, IDS).ids is None


def test_what_a_call_and_a_block_give() -> None:
    model = Plain()
    ambient = Ambient.attach(model)
    context = seen(model, inputs_embeds=torch.randn(2, 6, 8), position_ids=torch.arange(6)[None] + 3)
    assert context.ids is None and context.owner is not None and context.owner.tolist() == [0] * 6 + [1] * 6
    assert context.positions is not None and context.positions.tolist() == [3, 4, 5, 6, 7, 8] * 2
    with ambient.given(labels=torch.tensor([5, 6])), ambient.given(valid=torch.zeros(12, dtype=torch.bool)):
        context = seen(model, IDS, attention_mask=torch.ones(2, 1, 6, 6))
    assert context.labels is not None and context.labels.tolist() == [5] * 6 + [6] * 6
    assert context.valid is not None and not context.valid.any()
    with pytest.raises(BadInput, match=r"attention_mask \[2, 1, 6, 6\]"):
        model(IDS, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(BadInput, match="3 task labels"), ambient.given(labels=torch.zeros(3)):
        model(IDS)
    with pytest.raises(BadInput, match="context field 'task'"), ambient.given(task=1):
        pass
    with pytest.raises(BadInput, match="field ids of 5 rows"), ambient.given(ids=torch.zeros(5)):
        model(IDS)
    with pytest.raises(Refused, match="second Ambient"):
        Ambient.attach(model)
    with pytest.raises(BadInput, match="routed layer"):
        Ambient.attach(nn.Linear(1, 1))
    two = Plain()
    two.config = SimpleNamespace(is_encoder_decoder=True)
    with pytest.raises(Refused, match="attach one to each"):
        Ambient.attach(two)
    assert isinstance(model.moe.seat, Seat)


def test_a_shared_routing_replaces_the_routers() -> None:
    model = Plain()
    ambient = Ambient.attach(model)
    routing = Routing(torch.zeros(12, dtype=torch.long), torch.ones(12), 12, 4, 1)
    with ambient.given(routing=routing):
        y = model(IDS)
    torch.testing.assert_close(y, model.moe.bank.split()[0](model.embed(IDS)))
    with pytest.raises(BadInput, match="a routing of 12 rows"), ambient.given(routing=routing):
        model(IDS[:1])


# ---------------------------------------------------------------- capacity outside training, live experts in the balance


def test_capacity_in_evaluation_makes_a_row_depend_on_its_batch_and_training_only_does_not() -> None:
    crowd = torch.randn(1, 8).expand(8, 8)
    for overflow, changes in ((Capacity(1.25, 1.0), True), (TrainingOnly(Capacity(1.25, 1.0)), False)):
        moe = layer(Switch(), overflow=overflow).eval()
        alone, last = moe(crowd[:1]), moe(crowd)[-1:]
        assert torch.allclose(alone, last, atol=1e-6) is not changes
        assert (last == 0).all().item() is changes
        with Trace(moe.train()) as trace:
            moe(crowd)
        assert trace.entries[0].routing.dropped is not None and trace.entries[0].routing.dropped.sum() == 5


def test_balance_over_the_live_experts() -> None:
    live = torch.tensor([True, False, True, True])
    moe = MoE(Linear(8, 4), Switch(), GLU(4, 8, 6))
    nn.init.zeros_(moe.affinity.weight)
    valid = torch.tensor([True] * 3 + [False] * 2)
    even = Routing(torch.tensor([0, 2, 3, 0, 0]), torch.ones(5), 5, 4, 1, scores=Scores(torch.zeros(5, 4)))
    collapsed = Scores(torch.zeros(5, 4).index_fill(1, torch.tensor([2]), 50.0))
    entry = seen_entry(moe, Context(live=live, valid=valid))
    for scores, expert, want in ((even.scores, even.expert, 1.0), (collapsed, torch.tensor([2, 2, 2, 0, 0]), 3.0)):
        routing = Routing(expert, torch.ones(5), 5, 4, 1, scores=scores)
        assert LoadBalance(1.0)(type(entry)("layer", 0, moe, routing, entry.context)).item() == pytest.approx(want)


def seen_entry(moe: MoE, context: Context) -> Any:
    with Trace(moe) as trace:
        moe(torch.randn(5, 8), context)
    return trace.entries[0]


def test_a_trace_opened_again_starts_empty_and_a_failing_block_keeps_its_error() -> None:
    moe = layer()
    trace = Trace(moe)
    for _ in range(2):
        with trace:
            moe(torch.randn(3, 8))
        assert len(trace.entries) == 1
    with pytest.raises(ZeroDivisionError), Trace(moe):
        raise ZeroDivisionError
    assert moe.tap.collectors == []
