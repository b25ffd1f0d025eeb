"""The contracts of the routing parts: an Affinity scores rows alone, a Choice routes valid rows to live experts, an Overflow loses nothing silently, a Balance sees collapse."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Entry, Routing, Scores
from rarefy.core.roles import Affinity, Balance, Choice, Overflow
from rarefy.experts.banks.glu import GLU
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routing import unpadded
from rarefy.testing import figures
from rarefy.testing.contract import contract

_ROWS, _WIDTH, _EXPERTS = 12, 8, 4
_CUT = 7  # rows from here on are the future
_VALID = torch.arange(_ROWS) % 3 != 1
_LIVE = torch.tensor([True, False, True, True])


# ---------------------------------------------------------------- figures


def _logits(rows: int = _ROWS, experts: int = _EXPERTS, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * figures.weight(rows, experts, seed=seed)


def _routed(part: Choice, logits: Tensor, seed: int = 0, **context: Any) -> Routing:
    """What the choice makes of these logits, with the same draws every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return part(Scores(logits), Context(**context))


def _table(routing: Routing) -> tuple[Tensor, Tensor]:
    """How often each row is assigned to each expert, and with which weight: two of [R, E + 1]; the last column is nobody's."""
    times = torch.zeros(routing.items, routing.experts + 1)
    times.index_put_((routing.rows(), routing.expert), torch.ones(routing.expert.numel()), accumulate=True)
    weight = torch.zeros_like(times).index_put((routing.rows(), routing.expert), routing.weight.detach().float(), accumulate=True)
    return times, weight


def _same(one: Routing, other: Routing, rows: slice | Tensor = slice(None), of: slice | Tensor = slice(None)) -> bool:
    """Whether rows of one are assigned as rows `of` other, nobody's assignments aside."""
    (times, weight), (there, then) = _table(one), _table(other)
    return torch.equal(times[rows, :-1], there[of, :-1]) and torch.allclose(weight[rows], then[of], atol=1e-6)


def _contexts() -> Iterator[dict[str, Any]]:
    for training in (True, False):
        yield {"training": training}
        yield {"training": training, "valid": _VALID, "live": _LIVE}
        yield {"training": training, "live": torch.zeros(_EXPERTS, dtype=torch.bool)}


# ---------------------------------------------------------------- choice


@contract(Choice)
def every_index_is_an_expert_or_nobody(part: Choice) -> None:
    for context in _contexts():
        for logits in (_logits(), _logits(scale=60.0), torch.zeros(_ROWS, _EXPERTS)):
            found = _routed(part, logits, **context)
            shape, expert = found.rows().shape, found.expert
            assert expert.dtype == torch.long and expert.shape == found.weight.shape == shape, f"{part!r}: expert {expert.dtype} {tuple(expert.shape)} of rows {tuple(shape)}"
            assert bool(((expert >= 0) & (expert <= _EXPERTS)).all()), f"{part!r} routes to {sorted(set(expert.tolist()))} of {_EXPERTS} experts"
            assert bool(((found.rows() >= 0) & (found.rows() < _ROWS)).all()) and (found.items, found.experts) == (_ROWS, _EXPERTS), f"{part!r}: rows are out of range"
            assert bool(torch.isfinite(found.weight).all()) and not bool(found.weight[expert == _EXPERTS].any()), f"{part!r}: a weight is not finite, or nobody's is not 0"
            assert float(_table(found)[0][:, :-1].max()) <= 1, f"{part!r} assigns a row twice to one expert"


@contract(Choice)
def what_it_declares_holds(part: Choice) -> None:
    for context in _contexts():
        for seed in range(4):
            scores = Scores(_logits(seed=seed))
            stated = part.invariants(_routed(part, scores.logits, **context), scores, Context(**context))
            assert all(stated.values()), f"{part!r} declares what does not hold: {[text for text, holds in stated.items() if not holds]}"


@contract(Choice)
def it_runs_in_float32_and_under_autocast(part: Choice) -> None:
    router, x = Linear(_WIDTH, _EXPERTS), figures.weight(_ROWS, _WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = router(x, Context(), None)
        cast = _routed(part, scores.logits)
    plain = _routed(part, router(x, Context(), None).logits)
    assert cast.weight.dtype == plain.weight.dtype == torch.float32, f"{part!r}: weights are {cast.weight.dtype} under autocast and {plain.weight.dtype} without"
    assert _same(cast, plain), f"{part!r} routes otherwise under autocast"
    assert _routed(part, _logits().bfloat16()).weight.dtype.is_floating_point, f"{part!r} does not take bfloat16 logits"


@contract(Choice)
def of_equals_it_takes_the_lower_index(part: Choice) -> None:
    """Experts 2i and 2i + 1 are equal, for few experts and for as many as an unstable sort would mix up."""
    for experts in (4, 16, 64, 300):
        logits = _logits(5, experts // 2).repeat_interleave(2, 1)
        found, again = _routed(part, logits), _routed(part, logits)
        assert torch.equal(found.expert, again.expert) and torch.equal(found.weight, again.weight), f"{part!r} decides twice differently between equals"
        times = _table(found)[0][:, :-1].view(5, -1, 2)
        assert bool((times[..., 0] >= times[..., 1]).all()), f"{part!r} takes the higher of two equal experts among {experts}"


@contract(Choice)
def no_rows_give_no_assignments(part: Choice) -> None:
    logits = torch.zeros(0, _EXPERTS, requires_grad=True)
    found = _routed(part, logits)
    assert found.items == 0 and found.expert.shape == found.weight.shape == (0,), f"{part!r} makes {found.expert.numel()} assignments of no rows"


@contract(Choice)
def a_lone_expert_gets_every_row_and_k_of_all_gets_all(part: Choice) -> None:
    try:
        lone = _routed(part, _logits(5, 1).abs())  # every row likes it: where experts do not compete a row need not take one that it dislikes
    except BadInput:
        lone = None  # it needs more experts and says so
    assert lone is None or lone.counts().tolist() == [5], f"{part!r}: a lone expert gets {lone and lone.counts().tolist()} of 5 rows"
    if any(f.name == "k" for f in dataclasses.fields(part)):  # type: ignore[arg-type]
        every = dataclasses.replace(part, k=_EXPERTS)  # type: ignore[type-var]
        assert _routed(every, _logits()).counts().tolist() == [_ROWS] * _EXPERTS, f"{every!r} does not choose all of {_EXPERTS} experts"


@contract(Choice)
def padding_goes_to_nobody_and_changes_nothing(part: Choice) -> None:
    for training in (True, False):
        plain = _logits()
        first = _routed(part, plain, training=training, valid=_VALID)
        assert not bool(_table(first)[0][~_VALID, :-1].any()), f"{part!r} routes padding to an expert"
        for content in (-plain[:1], 50 * plain[:1], torch.zeros(1, _EXPERTS)):
            found = _routed(part, plain.where(_VALID[:, None], content), training=training, valid=_VALID)
            assert _same(found, first), f"{part!r}: what padding holds changes the routing of other rows"
        if part.causal(training) and not _draws(part, plain, training):
            assert _same(_routed(part, plain[_VALID], training=training), first, of=_VALID), f"{part!r} routes rows otherwise for padding being among them"


def _draws(part: Choice, logits: Tensor, training: bool) -> bool:
    """Whether other draws give another routing; draws are by place, and padding moves places."""
    one, other = (_routed(part, logits, seed=seed, training=training) for seed in (0, 1))
    return not _same(one, other)


@contract(Choice)
def dead_experts_get_nothing(part: Choice) -> None:
    for training in (True, False):
        for live in (_LIVE, torch.zeros(_EXPERTS, dtype=torch.bool)):
            logits = _logits() + 9.0 * ~live
            found = _routed(part, logits, training=training, live=live)
            assert not bool(found.counts()[~live].any()), f"{part!r} routes rows to dead experts"
            assert not bool(live.any()) or bool(found.counts().any()), f"{part!r} routes nothing to the live experts"


@contract(Choice)
def the_router_learns_through_the_weights(part: Choice) -> None:
    router, x = Linear(_WIDTH, _EXPERTS), figures.weight(_ROWS, _WIDTH)
    with torch.no_grad():
        router.weight.copy_(figures.weight(_EXPERTS, _WIDTH, seed=1))
    weight = _routed(part, router(x, Context(training=True), None).logits, training=True).weight
    assert weight.requires_grad, f"{part!r}: its weights have no gradient"
    (weight * figures.weight(*weight.shape, seed=2)).sum().backward()
    grad = router.weight.grad
    assert grad is not None and bool(torch.isfinite(grad).all()) and float(grad.abs().sum()) > 1e-4, f"{part!r}: the router's weight gets no gradient from the task"


@contract(Choice)
def its_causal_flag_is_true(part: Choice) -> None:
    """Later rows are changed in several ways; whether an earlier row's routing ever changes is what `causal` says, of training and of the rest."""
    for training in (True, False):
        moved, says = _later_rows_matter(part, training), part.causal(training)
        when = "in training" if training else "outside training"
        assert moved is not says, f"{part!r} says causal = {says} {when}, and later rows {'change' if moved else 'never change'} the routing of earlier ones"


def _later_rows_matter(part: Choice, training: bool) -> bool:
    for seed in range(4):
        plain = _logits(seed=seed)
        one = _routed(part, plain, training=training)
        for future in (-plain[_CUT:], 20 * plain[_CUT:], _logits(_ROWS - _CUT, seed=seed + 9)):
            other = _routed(part, torch.cat([plain[:_CUT], future]), training=training)
            if not _same(one, other, slice(0, _CUT), slice(0, _CUT)):
                return True
    return False


# ---------------------------------------------------------------- affinity


def _scored(part: Affinity, x: Tensor, training: bool = False) -> Scores:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scores: Scores = part(x, Context(ids=torch.arange(len(x)), training=training), GLU(_EXPERTS, _WIDTH, 6))
        return scores


def _drawn(part: Affinity) -> Affinity:
    """A copy whose parameters are all drawn: some start at zero, where much would hold by itself."""
    made = copy.deepcopy(part)
    for seed, parameter in enumerate(made.parameters()):
        with torch.no_grad():
            parameter.copy_(0.3 * figures.weight(*parameter.shape, seed=seed) + (parameter.dim() < 2))
    return made


def _seen(scores: Scores) -> list[Tensor]:
    return [t for t in (scores.logits, scores.select, scores.noise) if t is not None]


@contract(Affinity)
def scores_are_float32_of_every_row_and_expert(part: Affinity) -> None:
    made = _drawn(part)
    for rows in (0, 1, _ROWS):
        x = figures.weight(max(rows, 1), _WIDTH)[:rows]
        for training in (True, False):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                cast = _seen(_scored(made, x, training))
            for seen, exact in zip(cast, _seen(_scored(made, x, training)), strict=True):
                assert seen.shape == exact.shape == (rows, _EXPERTS), f"{part!r} gives {tuple(seen.shape)} for {rows} rows and {_EXPERTS} experts"
                assert seen.dtype == torch.float32 and torch.equal(seen, exact), f"{part!r} does not score in float32 under autocast"
            assert _scored(made, x.bfloat16(), training).logits.dtype == torch.float32, f"{part!r} does not score bfloat16 rows in float32"


@contract(Affinity)
def a_row_is_scored_alone(part: Affinity) -> None:
    made, x = _drawn(part), figures.weight(_ROWS, _WIDTH)
    for training in (True, False):
        changed = torch.cat([x[:_CUT], -3 * x[_CUT:]])
        for one, other in zip(_seen(_scored(made, x, training)), _seen(_scored(made, changed, training)), strict=True):
            assert torch.allclose(one[:_CUT], other[:_CUT], atol=1e-6), f"{part!r}: later rows change the scores of earlier ones"


@contract(Affinity)
def evaluation_has_no_noise(part: Affinity) -> None:
    made, x = _drawn(part), figures.weight(_ROWS, _WIDTH)
    bank = GLU(_EXPERTS, _WIDTH, 6)
    one, other = (made(x, Context(ids=torch.arange(_ROWS)), bank) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(_seen(one), _seen(other), strict=True)), f"{part!r} scores twice differently outside training"


@contract(Affinity)
def every_parameter_learns(part: Affinity) -> None:
    made = _drawn(part)
    assert any(True for _ in made.parameters()), f"{part!r} has no parameter"
    scores = _scored(made, figures.weight(_ROWS, _WIDTH), training=True)
    torch.stack([(t * figures.weight(*t.shape, seed=3)).sum() for t in _seen(scores)]).sum().backward()
    idle = [name for name, p in made.named_parameters() if p.grad is None or not bool(torch.isfinite(p.grad).all()) or float(p.grad.abs().sum()) == 0]
    assert not idle, f"{part!r}: no gradient for {', '.join(idle)}"


@contract(Affinity)
def copies_score_alike(part: Affinity) -> None:
    made, x = _drawn(part), figures.weight(_ROWS, _WIDTH)
    saved = io.BytesIO()
    torch.save(made.state_dict(), saved)
    saved.seek(0)
    loaded = copy.deepcopy(part)
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), loaded):
        assert torch.equal(_scored(other, x).logits, _scored(made, x).logits), f"{part!r} does not survive a copy or its state dict"


# ---------------------------------------------------------------- overflow


def _crowds() -> Iterator[tuple[Routing, Context]]:
    """Routings from even to crowded, with one and two experts per row, padding, a lone expert and no rows; some have lost assignments before."""
    for training in (True, False):
        for rows, experts, k, push in ((_ROWS, 4, 1, 0.0), (_ROWS, 4, 2, 4.0), (9, 3, 1, 50.0), (5, 1, 1, 0.0), (0, 4, 2, 0.0), (40, 4, 4, 0.0)):
            logits = _logits(rows, experts) + push * (torch.arange(experts) == 0)
            weight, expert = logits.softmax(-1).sort(dim=-1, descending=True)
            routing = Routing(expert[:, :k].flatten(), weight[:, :k].flatten(), rows, experts, k, scores=Scores(logits))
            yield routing, Context(training=training)
            lost = dataclasses.replace(routing, dropped=torch.arange(experts))
            yield lost, Context(training=training, valid=torch.arange(rows) % 3 != 1)


def _bound(part: Overflow, routing: Routing, context: Context) -> int | None:
    try:
        return part.bound(routing, context)
    except NotImplementedError as absent:
        raise AssertionError(f"{part!r} does not say how many assignments an expert keeps: define bound(routing, context)") from absent


@contract(Overflow)
def the_bound_is_never_exceeded(part: Overflow) -> None:
    for routing, context in _crowds():
        bound, found = _bound(part, routing, context), part(routing, context)
        assert bound is None or bool((found.counts() <= bound).all()), f"{part!r}: {found.counts().tolist()} assignments where an expert keeps at most {bound}"


@contract(Overflow)
def nothing_is_lost_silently(part: Overflow) -> None:
    for routing, context in _crowds():
        found, before = (unpadded(r, context.valid) for r in (part(routing, context), routing))
        zero = torch.zeros(routing.experts, dtype=torch.long)
        had, has = (zero if r.dropped is None else r.dropped for r in (routing, found))
        assert found.counts().sum() + has.sum() == before.counts().sum() + had.sum(), (
            f"{part!r}: kept {found.counts().tolist()} and dropped {has.tolist()} of {before.counts().tolist()}"
        )
        assert bool((has >= had).all()), f"{part!r} forgets what was dropped before it"
        nobody = found.expert == routing.experts
        assert not bool(found.weight[nobody].any()), f"{part!r}: what is dropped keeps a weight"


@contract(Overflow)
def where_there_is_room_nothing_changes(part: Overflow) -> None:
    for routing, context in _crowds():
        bound = _bound(part, routing, context)
        found, before = (unpadded(r, context.valid) for r in (part(routing, context), routing))
        if bound is None or int(before.counts().max()) <= bound:
            kept = found.counts().tolist(), [found.weight[found.expert < routing.experts].tolist()]
            want = before.counts().tolist(), [before.weight[before.expert < routing.experts].tolist()]
            assert kept == want, f"{part!r} changes a routing that is within its bound: {kept[0]} of {want[0]}"


@contract(Overflow)
def padding_takes_no_place(part: Overflow) -> None:
    rows = 12
    valid = torch.arange(2 * rows) >= rows
    for training in (True, False):
        seen = []
        for crowd in (torch.zeros(rows, dtype=torch.long), torch.arange(rows) % 4, torch.full((rows,), 4)):
            expert = torch.cat([crowd, (torch.arange(rows) % 5).clamp(max=3)])
            found = part(Routing(expert, torch.ones(2 * rows), 2 * rows, 4, 1), Context(training=training, valid=valid))
            seen.append((_table(found)[0][valid, :-1], 0 if found.dropped is None else int(found.dropped.sum())))
        assert all(torch.equal(t, seen[0][0]) and d == seen[0][1] for t, d in seen), f"{part!r}: where padding would go changes what other rows get"


@contract(Overflow)
def what_it_keeps_has_its_gradient(part: Overflow) -> None:
    for routing, context in _crowds():
        weight = routing.weight.clone().requires_grad_()
        part(dataclasses.replace(routing, weight=weight), context).weight.sum().backward()
        kept = _table(unpadded(part(routing, context), context.valid))[1][routing.rows(), routing.expert] != 0
        assert weight.grad is not None and bool((weight.grad[kept] != 0).all()), f"{part!r} cuts the gradient of weights that it keeps"


# ---------------------------------------------------------------- balance


def _entry(logits: Tensor, valid: Tensor | None = None, live: Tensor | None = None) -> Entry:
    """One layer's record: each row to its likeliest expert after a noise that favours each expert as often."""
    rows, experts = logits.shape
    tilt = torch.stack([torch.linspace(0.2, -0.2, experts).roll(r) for r in range(rows)]) if rows else torch.zeros(0, experts)
    if live is not None:
        tilt = torch.zeros(rows, experts)
        alive = live.nonzero().flatten()
        for r in range(rows):
            tilt[r, alive] = torch.linspace(0.2, -0.2, len(alive)).roll(r)
    scores = Scores(logits, select=logits + tilt, noise=torch.full_like(logits, 0.7) + 0.0 * logits)
    noisy = scores.select if live is None else scores.select.masked_fill(~live, -1e9)  # type: ignore[union-attr]
    assert noisy is not None
    weight, expert = noisy.softmax(-1).max(-1)
    return Entry("layer", 0, None, Routing(expert, weight, rows, experts, 1, scores=scores), Context(training=True, valid=valid, live=live))


def _collapsed(expert: int, rows: int = _ROWS) -> Tensor:
    return torch.zeros(rows, _EXPERTS).index_fill(1, torch.tensor([expert]), 12.0)


def _even(part: Balance, experts: int) -> float:
    try:
        return part.even(experts)
    except NotImplementedError as absent:
        raise AssertionError(f"{part!r} does not say what it gives for an even load: define even(experts)") from absent


@contract(Balance)
def it_has_the_value_that_it_states(part: Balance) -> None:
    for experts in (2, 4, 6):
        found, want = float(part(_entry(torch.zeros(12, experts)))), _even(part, experts)
        assert abs(found - want) <= 1e-5 * max(1.0, abs(want)), f"{part!r} states {want:.6g} for {experts} even experts and gives {found:.6g}"
    found, want = float(part(_entry(torch.zeros(12, _EXPERTS), live=_LIVE))), _even(part, 3)
    assert abs(found - want) <= 1e-5 * max(1.0, abs(want)), f"{part!r} states {want:.6g} for 3 even live experts and gives {found:.6g} with a fourth that is dead"


@contract(Balance)
def a_collapsed_layer_costs_more(part: Balance) -> None:
    even, values = _even(part, _EXPERTS), [float(part(_entry(_collapsed(e)))) for e in range(_EXPERTS)]
    assert min(values) > even + 0.1 * max(abs(even), 1e-9), f"{part!r} gives {values} for layers collapsed on each expert and {even:.6g} for an even one"


@contract(Balance)
def padding_does_not_count(part: Balance) -> None:
    real = _logits(scale=1.0)
    alone = float(part(_entry(real)))
    valid = torch.arange(2 * _ROWS) < _ROWS
    for content in (torch.zeros(_ROWS, _EXPERTS), _collapsed(1), _collapsed(2)):
        found = float(part(_entry(torch.cat([real, content]), valid)))
        assert abs(found - alone) <= 1e-5 * max(1e-3, abs(alone)), f"{part!r} gives {found:.6g} with padding and {alone:.6g} without"


@contract(Balance)
def it_has_a_gradient(part: Balance) -> None:
    logits = _logits(scale=1.0).requires_grad_()
    value = part(_entry(logits))
    assert value.shape == () and value.requires_grad, f"{part!r} gives no scalar with a gradient"
    value.backward()
    assert logits.grad is not None and bool(torch.isfinite(logits.grad).all()) and bool(logits.grad.any()), f"{part!r}: the scores get no gradient"


@contract(Balance)
def two_layers_collapsed_on_different_experts_are_both_seen(part: Balance) -> None:
    """Added up over layers, their loads would be even; each layer costs what it costs alone, in whatever order they come."""
    one, other = _entry(_collapsed(0)), _entry(_collapsed(1))
    alone = [float(copy.deepcopy(part)(entry)) for entry in (one, other)]
    together = [float(part(entry)) for entry in (one, other, one)]
    assert together == [*alone, alone[0]], f"{part!r} gives {together} for layers that cost {alone} alone: it remembers layers"
    assert min(alone) > _even(part, _EXPERTS), f"{part!r} does not see a layer that collapsed beside one that collapsed elsewhere"


@contract(Balance)
def no_rows_cost_nothing(part: Balance) -> None:
    for entry in (_entry(torch.zeros(0, _EXPERTS)), _entry(_logits(), valid=torch.zeros(_ROWS, dtype=torch.bool))):
        value = float(part(entry))
        assert value == 0.0, f"{part!r} gives {value} where no row counts"
