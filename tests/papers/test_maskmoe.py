"""MaskMoE: rare tokens meet one expert for good, frequent ones keep a choice; masks are drawn once, per layer, and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.core.control import Control
from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Scores
from rarefy.core.trace import Trace
from rarefy.experts.banks.glu import GLU
from rarefy.experts.moe import MoE
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.topk import TopK
from rarefy.experts.routers.vocabulary_mask import Masked, VocabularyMask, drawn
from rarefy.experts.routing import per_row
from rarefy.tasks.char_lm import CharLM, _text
from tests.evidence import check

SLUG = "maskmoe"
COUNTS = torch.tensor([500, 300, 100, 40, 30, 20, 5, 5])  # the first three make 0.9 of 1000
WIDTH, EXPERTS = 6, 8


def masks(kind: type[Masked]) -> None:
    """Two layers in training: over 30 steps each token meets at most the experts that it sees, rare ones one and the same, by token and not by place; so after a reload."""
    torch.manual_seed(0)
    layers = [MoE(kind(WIDTH, EXPERTS, drawn(COUNTS, EXPERTS, share=0.9, few=1, many=4)), VocabularyMask(), GLU(EXPERTS, WIDTH, 5)) for _ in range(2)]
    again = MoE(kind(WIDTH, EXPERTS, drawn(COUNTS, EXPERTS)), VocabularyMask(), GLU(EXPERTS, WIDTH, 5))
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.01)
    met: list[dict[int, set[int]]] = []
    for layer in layers:
        seen: dict[int, set[int]] = {}
        for _ in range(30):
            optimizer.zero_grad()
            meets(layer, seen).square().mean().backward()
            optimizer.step()
        met.append({token: set(experts) for token, experts in seen.items()})
        again.load_state_dict(layer.state_dict())
        meets(again, seen)
        assert [len(seen[token]) for token in range(3, 8)] == [1] * 5, "a rare token meets several experts"
        assert all(1 < len(seen[token]) <= 4 for token in range(3)), {t: len(s) for t, s in seen.items()}
    assert met[0] != met[1], "both layers have one mask"


def meets(layer: Any, seen: dict[int, set[int]]) -> Tensor:
    """Route 60 random rows, and add to what each token met."""
    ids = torch.randint(8, (60,))
    with Trace(layer) as trace:
        y: Tensor = layer(3 * torch.randn(60, WIDTH), Context(ids=ids))
    for token, expert in zip(ids.tolist(), trace.entries[0].routing.expert.tolist(), strict=True):
        seen.setdefault(token, set()).add(expert)
    return y


class Resampled(Masked):
    """A new mask at every step."""

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        self.visible.copy_(drawn(COUNTS, EXPERTS, share=0.9, few=1, many=4))
        return super().forward(x, context, bank)


class ByPlace(Masked):
    """A mask of places."""

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        return super().forward(x, Context(ids=torch.arange(len(x)) % len(COUNTS)), bank)


class Unsaved(Masked):
    """The mask is not in the checkpoint."""

    def __init__(self, width: int, experts: int, visible: Tensor | None = None) -> None:
        super().__init__(width, experts, visible)
        self.register_buffer("visible", self.visible, persistent=False)


MASKS = "a rare token meets one expert for good, a frequent one as many as it sees, after a reload too"


@check(SLUG, MASKS, kind="method")
def test_masks() -> None:
    masks(Masked)


# The paper was not read, and no code was found: the twins are not marked, so that the row stays partial.
@pytest.mark.parametrize("twin", [Resampled, ByPlace, Unsaved])
def test_masks_twins(twin: type[Masked]) -> None:
    with pytest.raises(AssertionError):
        masks(twin)


def test_all_visible_is_plain_routing_to_the_bit_and_one_visible_does_not_look_at_the_row() -> None:
    torch.manual_seed(0)
    x, ids, linear = torch.randn(40, WIDTH), torch.randint(8, (40,)), Linear(WIDTH, EXPERTS)
    whole = Masked(WIDTH, EXPERTS, drawn(COUNTS, EXPERTS, few=8, many=8))
    whole.inner = linear
    plain = TopK(2, renormalise=False)(linear(x, Context(), None), Context())
    found = VocabularyMask(2)(whole(x, Context(ids=ids), None), Context())
    assert torch.equal(found.expert, plain.expert) and torch.equal(found.weight, plain.weight)
    hashed = Masked(WIDTH, EXPERTS, drawn(COUNTS, EXPERTS, few=1, many=1))
    for rows in (x, -9 * x):
        routing = VocabularyMask()(hashed(rows, Context(ids=ids), None), Context())
        assert torch.equal(routing.expert, hashed.visible.int().argmax(1)[ids]) and bool((routing.weight == 1).all())
    (grad,) = torch.autograd.grad(routing.weight.sum(), hashed.inner.weight)
    assert not grad.any(), "tokens of one expert teach the router"
    two = VocabularyMask(2)(hashed(x, Context(ids=ids), None), Context())
    assert bool((per_row(two) == 1).all()), "a token meets an expert that it does not see"


def test_frequent_tokens_are_the_fewest_that_make_the_share_and_experts_are_drawn_evenly() -> None:
    assert drawn(COUNTS, 8, share=0.9, many=3).sum(1).tolist() == [3, 3, 3, 1, 1, 1, 1, 1]
    assert drawn(COUNTS, 8, share=0.901, many=3).sum(1).tolist() == [3, 3, 3, 3, 1, 1, 1, 1]
    assert drawn(COUNTS, 8, share=0.0, many=3).sum() == 8 and drawn(COUNTS, 2, share=1.0, many=8).sum() == 16
    torch.manual_seed(0)
    load = drawn(torch.ones(8000), 8, share=0.0).sum(0).float()
    assert load.sum() == 8000 and load.std() / load.mean() < 0.06


def test_on_text_by_a_file_of_counts(tmp_path: Path) -> None:
    """Held-out loss after characters outside 90% of the text, then after all: 2.829 and 2.382 with the mask, 2.968 and 2.439 without (seed 0)."""
    text = _text()[:-20_000]
    counts = torch.bincount(text, minlength=128)
    (tmp_path / "counts.txt").write_text("\n".join(map(str, counts.tolist())))
    rare = drawn(counts, 8, share=0.9, few=1, many=2).sum(1) == 1
    found = {}
    for router in (f"vocabulary-mask:counts={tmp_path / 'counts.txt'},many=4", "vocabulary-mask"):
        task = CharLM(width=32, experts=8, inner=16, rows=64)
        model: Any = task.model(0, router=router)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        control = Control(model, optimizer, model.controllers)
        for step in range(150):
            optimizer.zero_grad()
            control.loss(task.loss(model, task.batch(0, step))).backward()
            optimizer.step()
        control.close()
        x = _text()[-20_000:].unfold(0, 13, 7)
        with Trace(model.eval()) as trace, torch.no_grad():
            loss = F.cross_entropy(model(x[:, :-1]), x[:, -1], reduction="none")
        here = rare[x[:, -2]]
        found[router[:16]] = (float(loss[here].mean()), float(loss.mean()))
        pairs = {(i, e) for i, e in zip(x[:, -2].tolist(), trace.entries[0].routing.expert.tolist(), strict=True) if rare[i]}
        assert ":" not in router or len(pairs) == len({i for i, _ in pairs}), "a rare character meets several experts"
    (masked, free) = found.values()
    assert masked[0] < free[0] and masked[1] < free[1] + 0.05, found


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="without token ids"):
        Masked(WIDTH, EXPERTS)(torch.randn(3, WIDTH), Context(), None)
    for wrong in ({"share": 1.5}, {"few": 0}, {"few": 3, "many": 2}):
        with pytest.raises(BadInput, match="at least one expert"):
            VocabularyMask(**wrong)
    with pytest.raises(BadInput, match="FileNotFoundError"):
        VocabularyMask(counts=str(tmp_path / "none")).affinity(WIDTH, EXPERTS)
    (tmp_path / "zero").write_text("0\n0")
    with pytest.raises(BadInput, match="some token occurs"):
        VocabularyMask(counts=str(tmp_path / "zero")).affinity(WIDTH, EXPERTS)
    with pytest.raises(BadInput, match="k = 9"):
        VocabularyMask(9)(Scores(torch.zeros(1, 8)), Context())
