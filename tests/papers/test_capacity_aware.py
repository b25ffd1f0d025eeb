"""Capacity-aware inference: a hard bound on the busiest expert, the best by score stay, idle local experts take more; on a foreign model and the command line too."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.core.control import Control
from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Routing, Scores
from rarefy.core.roles import Overflow
from rarefy.core.trace import Trace
from rarefy.experts.overflow.capacity import Capacity, first_come
from rarefy.experts.overflow.expanded_drop import ExpandedDrop
from rarefy.experts.overflow.score_capacity import ScoreCapacity, best_first
from rarefy.experts.routers.topk import TopK
from rarefy.experts.routing import dense, per_row, unpadded
from rarefy.tasks.char_lm import CharLM
from tests.evidence import check

SLUG = "capacity-aware"
ROWS, EXPERTS, K = 1000, 8, 2
Rule = Callable[[float], Overflow]


def skewed(renormalise: bool = False) -> Routing:
    """1000 rows, most of which like the same of 8 experts."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, EXPERTS, generator=g) + 1.5 * torch.randn(EXPERTS, generator=g)
    return TopK(K, renormalise=renormalise)(Scores(logits), Context())


def bounded(rule: Rule) -> None:
    """No expert has more than ceil(gamma k T / E), exactly that many where more came; drops fall with gamma and are gone at E / k, with the same bits."""
    routing, lost = skewed(), []
    assert routing.counts().max() > 2.5 * ROWS * K / EXPERTS
    for gamma in (0.5, 1.0, 1.3, 1.5, 2.0, EXPERTS / K):
        found, limit = rule(gamma)(routing, Context()), ceil(gamma * K * ROWS / EXPERTS)
        assert torch.equal(found.counts(), routing.counts().clamp(max=limit)), (gamma, found.counts())
        lost.append(int(found.dropped.sum()))  # type: ignore[union-attr]
        assert lost[-1] == int((routing.counts() - limit).clamp(min=0).sum())
    assert lost[:-1] == sorted(lost[:-1], reverse=True) and lost[0] > lost[3] > 0 == lost[-1]
    assert torch.equal(found.expert, routing.expert) and torch.equal(found.weight, routing.weight)


def best_stay(rule: Rule) -> None:
    """Of an expert's rows none that left likes it more than one that stayed, by its softmax probability, weights being renormalised or not."""
    for renormalise in (False, True):
        routing = skewed(renormalise)
        p, asked = routing.scores.logits.softmax(-1), dense(routing) > 0  # type: ignore[union-attr]
        stays = dense(rule(1.0)(routing, Context())) > 0
        for e in (routing.counts() > ROWS * K / EXPERTS).nonzero().flatten().tolist():
            assert p[stays[:, e], e].min() >= p[asked[:, e] & ~stays[:, e], e].max()


@dataclass(frozen=True)
class ByChance(ScoreCapacity):
    """Drops at random."""

    def __call__(self, routing: Routing, context: Context) -> Routing:
        g = torch.Generator().manual_seed(0)
        return best_first(unpadded(routing, context.valid), torch.rand(routing.expert.numel(), generator=g), self.bound(routing, context))


@dataclass(frozen=True)
class FallsBack(ScoreCapacity):
    """A dropped slot goes back to the row's first choice, as in the released patch for any model."""

    def __call__(self, routing: Routing, context: Context) -> Routing:
        found = super().__call__(routing, context)
        first = routing.expert.view(-1, K)[:, :1].expand(-1, K).flatten()
        return Routing(found.expert.where(found.expert < EXPERTS, first), found.weight, found.items, EXPERTS, K, dropped=found.dropped)


BOUND = "the busiest expert never has more than its capacity, and a capacity of all drops nothing"
STAY = "those that score highest stay"


@check(SLUG, BOUND, kind="method")
def test_bounded() -> None:
    bounded(ScoreCapacity)


@check(SLUG, BOUND, kind="twin")
def test_bounded_twin_that_falls_back() -> None:
    with pytest.raises(AssertionError):
        bounded(FallsBack)


@check(SLUG, STAY, kind="method")
def test_best_stay() -> None:
    best_stay(ScoreCapacity)


@check(SLUG, STAY, kind="twin")
@pytest.mark.parametrize("twin", [ByChance, lambda gamma: Capacity(gamma, gamma)])
def test_best_stay_twins(twin: Rule) -> None:
    with pytest.raises(AssertionError):
        best_stay(twin)


@check(SLUG, STAY, kind="oracle")
def test_against_sorting_in_python() -> None:
    routing = skewed()
    p = routing.scores.logits.double().softmax(-1)  # type: ignore[union-attr]
    want = torch.zeros(ROWS, EXPERTS)
    chosen = routing.expert.view(-1, K).tolist()
    for e in range(EXPERTS):
        asked = [r for r in range(ROWS) if e in chosen[r]]
        for r in sorted(asked, key=lambda r: -p[r, e].item())[:250]:
            want[r, e] = p[r, e]
    torch.testing.assert_close(dense(ScoreCapacity(1.0)(routing, Context())), want)


def expands(rule: Callable[..., Overflow]) -> None:
    """The same bound; every expert has as many rows as under drops alone or more, the idle ones more; new ones are of the row's device, weigh their probability, and count once."""
    routing = skewed()
    p = routing.scores.logits.softmax(-1)  # type: ignore[union-attr]
    device = torch.arange(ROWS) * 2 // ROWS
    for gamma in (1.0, 1.5):
        limit = ceil(gamma * K * ROWS / EXPERTS)
        alone = ScoreCapacity(gamma)(routing, Context())
        found = rule(gamma, devices=2)(routing, Context())
        assert found.counts().max() <= limit
        assert bool((found.counts() >= alone.counts()).all()) and found.counts().sum() > alone.counts().sum() + 50
        new = (dense(found) > 0) & (dense(routing) == 0)
        assert new.any() and bool(((torch.arange(EXPERTS) // 4)[None].expand_as(new) == device[:, None])[new].all())
        torch.testing.assert_close(dense(found)[dense(found) > 0], p[dense(found) > 0])
        assert int(per_row(found).sum()) == int((dense(found) > 0).sum()), "an expert twice in a row"
        one = rule(gamma, devices=2, extra=1)(routing, Context())
        idle = [half * 4 + int(routing.counts().view(2, 4)[half].argmin()) for half in (0, 1)]
        fresh = ((dense(one) > 0) & (dense(routing) == 0)).any(0).nonzero().flatten().tolist()
        assert fresh == idle, "not the least loaded of each device"


class DropsAlone(ExpandedDrop):
    def _asked(self, routing: Routing, context: Context) -> Routing:
        return routing


class Anywhere(ExpandedDrop):
    """All experts are local."""

    def _least_loaded(self, routing: Routing, device: Tensor) -> Tensor:
        return routing.counts().argsort(stable=True)[: self.extra].expand(routing.items, -1)


class AfterTheDrop(ExpandedDrop):
    """Capacity first, then more: who comes last is not bounded."""

    def __call__(self, routing: Routing, context: Context) -> Routing:
        return self._asked(ScoreCapacity(self.factor)(routing, context), context)


EXPANDS = "rows that ask for idle experts of their device too keep the bound, and fill experts"


@check(SLUG, EXPANDS, kind="method")
def test_expands() -> None:
    expands(ExpandedDrop)


@check(SLUG, EXPANDS, kind="twin")
@pytest.mark.parametrize("twin", [DropsAlone, Anywhere, AfterTheDrop])
def test_expands_twins(twin: Callable[..., Overflow]) -> None:
    with pytest.raises(AssertionError):
        expands(twin)


@cache
def trained(seed: int) -> Any:
    """A routed character model, trained without a bound for 200 steps, and without a balance loss so that its experts are crowded."""
    task = CharLM(width=32, experts=8, inner=8, rows=64)
    model: Any = task.model(seed, router="topk:k=2")
    model.moe.overflow, model.balances = None, ()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    control = Control(model, optimizer, model.controllers)
    for step in range(200):
        optimizer.zero_grad()
        control.loss(task.loss(model, task.batch(seed, step))).backward()
        optimizer.step()
    return task, model


def loses_little(rule: Rule) -> None:
    """Where too many rows ask for an expert, dropping those that score low costs less than dropping at random, at every capacity.

    Held-out loss without a bound, then by score, by chance and first come at gamma 1: seed 0 2.381, 2.398, 2.403, 2.406; seed 1 2.369, 2.409,
    2.414, 2.408; seed 2 2.444, 2.528, 2.572, 2.556. Expanded drop: 2.394, 2.412, 2.528. Renormalised: 2.442, 2.465, 2.535, always worse here.
    First come does as well as score in seed 1, so that is not claimed.
    """
    for seed in (0, 2):
        task, model = trained(seed)
        for gamma in (1.5, 1.0, 0.75):
            loss = []
            for each in (rule(gamma), ByChance(gamma)):
                model.moe.overflow = each
                loss.append(task.evaluate(model)["loss"])
            assert loss[0] < loss[1] - 0.003, (seed, gamma, loss)


LOSES = "on text dropping by score costs less than dropping by chance"


@check(SLUG, LOSES, kind="method")
def test_loses_little() -> None:
    loses_little(ScoreCapacity)


@check(SLUG, LOSES, kind="twin")
def test_loses_little_twin() -> None:
    with pytest.raises(AssertionError):
        loses_little(ByChance)


def test_padding_labels_and_lone_rows() -> None:
    g = torch.Generator().manual_seed(1)
    logits, valid = torch.randn(12, 4, generator=g) + torch.tensor([3.0, 0.0, 0.0, 0.0]), torch.arange(12) % 3 != 1
    routing = TopK(2, renormalise=False)(Scores(logits), Context())
    for rule in (ScoreCapacity(0.7), ExpandedDrop(0.7, devices=2)):
        found = rule(routing, Context(valid=valid))
        assert not dense(found)[~valid].any() and found.counts().max() <= rule.bound(routing, Context())
        again = rule(TopK(2, renormalise=False)(Scores(logits.where(valid[:, None], 9.0)), Context()), Context(valid=valid))
        assert torch.equal(dense(found), dense(again))
    there = ExpandedDrop(2.0, devices=2)(routing, Context(labels=torch.full((12,), 1)))
    assert not ((dense(there) > 0) & (dense(routing) == 0))[:, :2].any()
    live = torch.tensor([True, True, True, False])
    assert ExpandedDrop(9.0)(TopK(2)(Scores(logits), Context(live=live)), Context(live=live)).counts().tolist() == [12, 12, 12, 0]
    lone = TopK(2)(Scores(logits[:1]), Context())
    assert torch.equal(dense(ExpandedDrop(1.0)(lone, Context())), dense(lone))


def test_renormalised_rows_sum_to_what_they_did() -> None:
    for renormalise in (False, True):
        routing = skewed(renormalise)
        before = dense(routing).sum(1)
        for rule in (ScoreCapacity(1.0, renormalise=True), ExpandedDrop(1.0, devices=2, renormalise=True)):
            after = dense(rule(routing, Context())).sum(1)
            served = after != 0
            assert served.sum() > 700
            torch.testing.assert_close(after[served], before[served])
    kept = ExpandedDrop(4.0, devices=1)(skewed(True), Context())
    p = skewed().scores.logits.softmax(-1)  # type: ignore[union-attr]
    ratio = dense(kept) / p
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


def test_what_is_refused() -> None:
    with pytest.raises(BadInput, match="capacity factor"):
        ScoreCapacity(0.0)
    with pytest.raises(BadInput, match="at least one device"):
        ExpandedDrop(devices=0)
    with pytest.raises(BadInput, match="8 experts on 3 devices"):
        ExpandedDrop(devices=3)(skewed(), Context())
    with pytest.raises(BadInput, match="one of 2 devices"):
        ExpandedDrop(devices=2)(skewed(), Context(labels=torch.full((ROWS,), 2)))
    chosen = skewed()
    with pytest.raises(BadInput, match="not row-major"):
        ExpandedDrop()(Routing(chosen.expert, chosen.weight, ROWS, EXPERTS, item=chosen.rows(), scores=chosen.scores), Context())
    assert first_come(chosen, Context(), 250).counts().max() == 250


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Mixtral with a word-level tokenizer, as a folder."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("mixtral")
    words = {w: i for i, w in enumerate(["<s>", "<unk>", *(chr(c) for c in range(97, 123))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=len(words), num_local_experts=4, num_experts_per_tok=2, **sizes)).save_pretrained(folder)
    (folder / "text.txt").write_text("sparse networks choose what to keep " * 30)
    return str(folder)


@pytest.mark.parametrize("rule", ["score-capacity:factor=1.0", "expanded-drop:factor=1.0,devices=2"])
def test_the_command_line_bounds_a_checkpoints_experts(capsys: pytest.CaptureFixture[str], mixtral: str, rule: str) -> None:
    from rarefy.cli.main import main

    def evaluated(*more: str) -> Any:
        code = main(["eval", mixtral, "--text", str(Path(mixtral) / "text.txt"), "--tokens", "508", "--window", "128", "--json", *more])
        out = capsys.readouterr()
        assert code == 0, out.err
        return json.loads(out.out)

    plain, found = evaluated(), evaluated("--overflow", rule)
    assert found["overflow"] == rule and 0.9 < found["experts"]["busiest"] <= 1.0 and 0 < found["experts"]["dropped"] < 0.5
    assert found["perplexity"] != plain["perplexity"] and "overflow" not in plain
    assert evaluated("--overflow", "score-capacity:factor=2.0")["perplexity"] == plain["perplexity"]


def test_a_foreign_model_takes_more_than_its_k_experts(mixtral: str) -> None:
    transformers = pytest.importorskip("transformers")
    from rarefy.hub.routers import adapt

    model = adapt(transformers.MixtralForCausalLM.from_pretrained(mixtral).eval(), ExpandedDrop(4.0))
    with Trace(model) as trace, torch.no_grad():
        model(torch.arange(2, 12)[None])
    assert all(entry.routing.counts().tolist() == [10] * 4 for entry in trace.entries)
