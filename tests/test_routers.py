"""Hugging Face routers as ours: seen, bounded, overridden; the identity keeps every bit; one graph under fullgraph."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.ambient import Ambient
from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Context, Routing
from rarefy.core.trace import Trace
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.overflow.capacity import Capacity

transformers = pytest.importorskip("transformers")

from rarefy.hub.experts import use_experts  # noqa: E402
from rarefy.hub.routers import adapt, routers, unadapt  # noqa: E402

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
MODELS = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8, "pad_token_id": None, "norm_topk_prob": True},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
IDS = torch.arange(10).view(2, 5)


HOSTS = ["eager", "batched_mm", "grouped_mm", "rarefy"]


def build(kind: str = "Mixtral", host: str = "eager", **options: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **MODELS[kind], **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, experts_implementation="eager" if host == "rarefy" else host)
    for parameter in model.parameters():  # some routers and biases start at zero
        nn.init.normal_(parameter, std=0.3)
    return use_experts(model.eval()) if host == "rarefy" else model.eval()


def run(model: Any) -> list[Tensor]:
    model.zero_grad()
    out = model(IDS).logits
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def rewritten(routing: Routing, context: Context) -> Routing:
    """The same routing in another record: read and written back."""
    return replace(routing)


@pytest.mark.parametrize("kind", MODELS)
def test_the_identity_keeps_every_bit_of_outputs_and_gradients(kind: str) -> None:
    model = build(kind)
    want = run(model)
    for rule in (None, rewritten, Capacity(1.0, 4.0)):
        adapted = adapt(copy.deepcopy(model), rule)
        with Trace(adapted, rows=True) as trace:
            got = run(adapted)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert [(e.path, e.call) for e in trace.entries] == [(path, 0) for path, _, _ in routers(model)]
        assert len(trace.entries) == 2
        for entry in trace.entries:
            assert entry.routing.counts().sum() == 20 and entry.x is not None and entry.x.shape == (10, 16)
        assert adapted.state_dict().keys() == model.state_dict().keys()
        same = unadapt(adapted)
        assert [n for n, _ in same.named_modules()] == [n for n, _ in model.named_modules()]
        with pytest.raises(BadInput, match=r"rarefy\.hub\.routers\.adapt"), Trace(same):
            pass


def test_the_entry_says_what_the_router_chose_and_balance_reaches_it() -> None:
    model = adapt(build())
    with Trace(model, rows=True) as trace:
        model(IDS)
    entry = trace.entries[0]
    assert entry.x is not None
    logits = entry.x @ entry.layer.weight.T
    weight, index = logits.softmax(-1).topk(2)
    assert torch.equal(entry.routing.expert, index.flatten())
    torch.testing.assert_close(entry.routing.weight, (weight / weight.sum(-1, keepdim=True)).flatten())
    model.zero_grad()
    LoadBalance(1.0)(entry).backward()
    assert entry.layer.weight.grad is not None and entry.layer.weight.grad.abs().sum() > 0


def forced(expert: int) -> Any:
    def rule(routing: Routing, context: Context) -> Routing:
        return Routing(torch.full((routing.items,), expert), torch.ones(routing.items), routing.items, routing.experts, 1, scores=routing.scores)

    return rule


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kind", MODELS)
def test_forcing_everything_to_one_expert_equals_that_expert_alone(kind: str, host: str) -> None:
    lone = build(kind, host)
    model = adapt(copy.deepcopy(lone), forced(0))
    for _, router, experts in routers(lone):
        router.register_forward_hook(lambda m, a, out: (out[0], torch.full_like(out[1], 0.5), torch.zeros_like(out[2])))
        for name in ("gate_up_proj", "down_proj"):
            getattr(experts, name).data[1:] = float("nan")
    torch.testing.assert_close(model(IDS).logits, lone(IDS).logits, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(lone(IDS).logits).all()


@pytest.mark.parametrize("host", HOSTS)
def test_capacity_drops_and_the_output_follows(host: str) -> None:
    model = build(host=host)
    bounded = adapt(copy.deepcopy(model), Capacity(0.5, 0.5))
    with Trace(bounded) as trace:
        outs = run(bounded)
    for entry in trace.entries:
        assert entry.routing.counts().max() <= 3 and entry.routing.dropped is not None and entry.routing.dropped.sum() > 0
    _, _, experts = next(iter(routers(bounded)))
    x, routing = torch.randn(10, 16), trace.entries[0].routing
    dense = torch.zeros(10, 16)
    for row, expert, weight in zip(routing.rows().tolist(), routing.expert.tolist(), routing.weight.tolist(), strict=True):
        if expert < 4:
            both = experts.gate_up_proj[expert] @ x[row]
            dense[row] += weight * experts.down_proj[expert] @ (nn.functional.silu(both[:12]) * both[12:])
    seen: list[tuple[Any, ...]] = []
    handle = experts.register_forward_pre_hook(lambda m, args: seen.append(args))
    bounded(IDS)
    handle.remove()
    torch.testing.assert_close(experts(x, *seen[0][1:]), dense, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outs[0], run(model)[0], atol=1e-4)


@pytest.mark.parametrize("host", HOSTS)
def test_what_a_rule_sends_to_nobody_counts_for_nothing(host: str) -> None:
    nobody = adapt(build(host=host), lambda r, c: replace(r, expert=torch.full_like(r.expert, r.experts)))
    skipped = build()
    for layer in skipped.model.layers:
        layer.mlp.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    assert torch.equal(nobody(IDS).logits, skipped(IDS).logits)


def test_padding_reaches_a_foreign_routers_entry() -> None:
    model = adapt(build(), Capacity(4.0, 4.0))
    Ambient.attach(model)
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    with Trace(model) as trace:
        model(IDS, attention_mask=mask)
    for entry in trace.entries:
        assert entry.context.valid is not None and torch.equal(entry.context.valid, mask.bool().reshape(-1))
        assert entry.routing.counts().sum() == 16


def checkpointed(options: dict[str, Any] | None) -> tuple[Any, Ambient]:
    model = adapt(build(), Capacity(0.5)).train()
    ambient = Ambient.attach(model)
    if options is not None:
        model.gradient_checkpointing_enable({"context_fn": ambient.replay, **options} if not options["use_reentrant"] else options)
    return model, ambient


def test_under_gradient_checkpointing_two_forwards_and_their_losses_are_the_same() -> None:
    found = []
    for options in (None, {"use_reentrant": False}):
        model, _ = checkpointed(options)
        with Trace(model) as trace:
            losses = [model(ids, labels=ids).loss for ids in (IDS, IDS.flip(0) + 3)]
            (torch.stack(losses).sum() + torch.stack([LoadBalance()(e) for e in trace.entries]).sum()).backward()
        assert len(trace.entries) == 4
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-5)


def test_reentrant_gradient_checkpointing_is_refused() -> None:
    model, _ = checkpointed({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(Refused, match="use_reentrant=False"), Trace(model):
        model(IDS, labels=IDS)


def test_generation_goes_through_the_rule() -> None:
    model = adapt(build(), Capacity(8.0, 8.0))
    Ambient.attach(model)
    plain = unadapt(copy.deepcopy(model))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with Trace(model) as trace:
        got = model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    want = plain.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(got, want)
    last = trace.entries[-1]
    assert last.routing.items == 2 and last.context.positions is not None and last.context.positions.tolist() == [5, 7]


def test_refusals() -> None:
    model = build()
    with pytest.raises(BadInput, match="no router beside experts"):
        adapt(nn.Linear(1, 1))
    with pytest.raises(Refused, match="twice"):
        adapt(adapt(model))
    ambient = Ambient.attach(model)
    with pytest.raises(Refused, match="live experts"), ambient.given(live=torch.ones(4, dtype=torch.bool)):
        model(IDS)
    ambient.detach()
    adapt(unadapt(model), lambda r, c: Routing(r.expert, r.weight, r.items, r.experts, item=r.rows()))
    with pytest.raises(BadInput, match="k per row in row-major order"):
        model(IDS)
    _, router, _ = next(iter(routers(adapt(unadapt(model)))))
    router.forward = lambda x: x  # type: ignore[method-assign, assignment]
    with pytest.raises(BadInput, match=r"MixtralTopKRouter returning \[\[10, 16\]\]"):
        model(IDS)


@pytest.mark.parametrize(("kind", "rule"), [("Mixtral", None), ("GptOss", Capacity(0.5, 0.5))])
def test_compiled_in_one_graph_our_experts_equal_transformers_own(kind: str, rule: Any) -> None:
    torch._dynamo.reset()
    eager = adapt(build(kind, num_hidden_layers=1), rule)
    ours = use_experts(copy.deepcopy(eager))
    call: Any = torch.compile(ours, backend="aot_eager", fullgraph=True)
    found = []
    for model, forward in ((eager, eager), (ours, call)):
        with Trace(model) as trace:
            out = forward(IDS, use_cache=False).logits
            (out.square().sum() + torch.stack([LoadBalance()(e) for e in trace.entries]).sum()).backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-5)
    torch._dynamo.reset()
