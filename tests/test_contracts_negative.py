"""Every check of the contract suite fails on a part that is broken in the way it looks for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.exact import split_budget, topk_mask
from rarefy.core.records import Delta, Entries, Event, Progress, Pruned, Site, StatePolicy, Units
from rarefy.core.roles import Allocation, Criterion, ModelStatistic, Pattern, Rewiring, Schedule, Solver, Statistic, Trigger, View
from rarefy.testing.contract import contracts_of
from rarefy.weights.patterns.unstructured import PerMatrix
from rarefy.weights.rewiring.set import SET
from rarefy.weights.schedules.cosine import Cosine
from rarefy.weights.solvers.sparsegpt import SparseGPT
from rarefy.weights.statistics.input import InputNorm
from rarefy.weights.statistics.synaptic_flow import SynapticFlow
from rarefy.weights.triggers.plateau import Plateau
from rarefy.weights.views.soft_threshold import SoftThreshold


def caught(part: Any) -> dict[str, str]:
    """{contract function: message} of those that the part breaks."""
    found = {}
    for function in contracts_of(type(part)):
        try:
            function(part)
        except AssertionError as error:
            found[function.__name__] = str(error)
        except Exception as error:  # another check than the one that is looked for may meet the damage first
            found[function.__name__] = repr(error)
    return found


class Solving(Solver):
    """`made` says what becomes of SparseGPT's answer."""

    name = "solving"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hessian",)

    def made(self, weight: Tensor, hessian: Tensor, pattern: Pattern, count: int) -> Pruned:
        return SparseGPT().solve({"a": weight}, {"a": count}, stats={"hessian": {"a": hessian}}, pattern=pattern)["a"]

    def solve(self, weights: Mapping[str, Tensor], budget: Mapping[str, int], *, stats: Any, pattern: Pattern, bound: Any = None, generator: Any = None) -> dict[str, Pruned]:
        return {name: self.made(weight, stats["hessian"][name], pattern, budget[name]) for name, weight in weights.items()}


class Loses(Solving):
    """One fewer than asked."""

    def made(self, weight: Tensor, hessian: Tensor, pattern: Pattern, count: int) -> Pruned:
        good = super().made(weight, hessian, pattern, count)
        mask = good.mask & (good.mask.flatten().cumsum(0) > 1).view(weight.shape)
        return Pruned(torch.where(mask, good.weight, torch.zeros((), dtype=weight.dtype)), mask)


class Borrows(Solving):
    """Works in the weight that it is given."""

    def made(self, weight: Tensor, hessian: Tensor, pattern: Pattern, count: int) -> Pruned:
        good = super().made(weight, hessian, pattern, count)
        weight.mul_(good.mask)
        return good


class Overshoots(Solving):
    def made(self, weight: Tensor, hessian: Tensor, pattern: Pattern, count: int) -> Pruned:
        good = super().made(weight, hessian, pattern, count)
        return Pruned(good.weight * 3, good.mask)


class LovesTheDead(Solving):
    def made(self, weight: Tensor, hessian: Tensor, pattern: Pattern, count: int) -> Pruned:
        mask = pattern.mask(weight.float().abs() / (hessian.diagonal() + 1e-3), count)
        return Pruned(torch.where(mask, weight, 0.0), mask)


class Crashes(Solving):
    def made(self, weight: Tensor, hessian: Tensor, pattern: Pattern, count: int) -> Pruned:
        torch.linalg.cholesky(hessian + 1e-3 * hessian.diagonal().abs().mean().clamp_min(1e-30) * torch.eye(len(hessian)))
        return super().made(weight, hessian, pattern, count)


class NotFinite(Solving):
    def made(self, weight: Tensor, hessian: Tensor, pattern: Pattern, count: int) -> Pruned:
        good = super().made(weight, hessian, pattern, count)
        return good if hessian.diagonal().min() > 0 else Pruned(good.weight / 0.0, good.mask)


class Unnested(PerMatrix):
    name = "unnested"

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        return topk_mask(scores if count % 2 else -scores, count, bound)


class Scribbles(PerMatrix):
    name = "scribbles"

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        found = topk_mask(scores, count, bound)
        scores.mul_(0.5)
        return found


class Miscounts(PerMatrix):
    name = "miscounts"

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        return topk_mask(scores, max(count - 1, 0), bound)


class Flips(PerMatrix):
    """Keeps the smallest."""

    name = "flips"

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        return topk_mask(-scores, count, bound)


class LastOfEquals(PerMatrix):
    name = "last-of-equals"

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        return topk_mask(scores.flatten().flip(0), count, None if bound is None else bound.flatten().flip(0)).flip(0).view(scores.shape)


class Unbound(PerMatrix):
    name = "unbound"

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        return topk_mask(scores, count)


class RanksNaN(PerMatrix):
    name = "ranks-nan"

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        return topk_mask(scores.nan_to_num(0.0), min(count, scores.numel()), bound)


class HalfPrecision(Criterion):
    name = "half-precision"

    def scores(self, weight: Tensor, *, generator: Any = None) -> Tensor:
        return weight.abs()


class Moody(Criterion):
    name = "moody"

    def scores(self, weight: Tensor, *, generator: Any = None) -> Tensor:
        return weight.abs().float() * (1 + torch.rand(weight.shape))


class LikesZero(Criterion):
    name = "likes-zero"

    def scores(self, weight: Tensor, *, generator: Any = None) -> Tensor:
        return 1 / (1 + weight.abs().float())


class Signed(Criterion):
    name = "signed"

    def scores(self, weight: Tensor, *, generator: Any = None) -> Tensor:
        return weight.float().relu()


class NeverZero(InputNorm):
    name = "never-zero"

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        return super().finish(state) + 1e-6


class AllDead(InputNorm):
    name = "all-dead"

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        return super().finish(state) * 0


class OnlyTheLast(InputNorm):
    name = "only-the-last"

    def update(self, state: dict[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
        return super().update(self.start(seen), seen)


class PerBatch(InputNorm):
    """The sum of the batches' norms: the order does not matter, their size does."""

    name = "per-batch"

    def update(self, state: dict[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
        return {"square": state["square"] + seen.double().norm(dim=0)}


class OnlyLinear(InputNorm):
    """Takes the last axis of the weight for all of its input columns."""

    name = "only-linear"

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        return super().finish(state)[:8]


class Narrows(InputNorm):
    name = "narrows"

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        return super().finish(state).bfloat16()


class Approximate(Allocation):
    name = "approximate"

    def counts(self, units: Sequence[Units], budget: int) -> dict[str, int]:
        density = budget / sum(u.numel for u in units)
        return {u.name: round(u.numel * density) for u in units}


class TakesAnything(Allocation):
    name = "takes-anything"

    def counts(self, units: Sequence[Units], budget: int) -> dict[str, int]:
        low, high = sum(u.floor for u in units), sum(u.limit for u in units)
        split = split_budget([u.numel for u in units], min(max(budget, low), high), floors=[u.floor for u in units], caps=[u.limit for u in units])
        return dict(zip((u.name for u in units), split, strict=True))


class Seesaw(Allocation):
    name = "seesaw"

    def counts(self, units: Sequence[Units], budget: int) -> dict[str, int]:
        wishes = [u.numel * (1 + 3 * ((i + budget) % 2)) for i, u in enumerate(units)]
        return dict(zip((u.name for u in units), split_budget(wishes, budget, floors=[u.floor for u in units], caps=[u.limit for u in units]), strict=True))


class Wipes(Allocation):
    name = "wipes"

    def counts(self, units: Sequence[Units], budget: int, *, scores: Mapping[str, Tensor]) -> dict[str, int]:
        scores[units[0].name].zero_()
        return dict(zip((u.name for u in units), split_budget([u.numel for u in units], budget, floors=[u.floor for u in units], caps=[u.limit for u in units]), strict=True))


class Counts(Schedule):
    name = "counts"
    calls: ClassVar[list[int]] = []

    def __call__(self, progress: Progress) -> float:
        self.calls.append(1)
        return float(len(self.calls))


class LateStart(Cosine):
    name = "late-start"

    def __call__(self, progress: Progress) -> float:
        return 0.9 * super().__call__(progress)


class Restless(Schedule):
    name = "restless"

    def __call__(self, progress: Progress) -> float:
        return 1 / (1 + progress.phase_step)


class Wave(Schedule):
    name = "wave"

    def __call__(self, progress: Progress) -> float:
        return 0.0 if progress.phase_step > 4000 else math.sin(progress.phase_step / 50) ** 2


@dataclass(frozen=True)
class Shrinks(SET):
    name = "shrinks"

    def rewire(self, entries: Entries, *, count: int, fraction: float, bound: Tensor | None, generator: Any) -> Delta:
        delta = super().rewire(entries, count=count, fraction=fraction, bound=bound, generator=generator)
        return Delta(delta.drop, delta.grow[:-1])


@dataclass(frozen=True)
class AlwaysDrops(SET):
    """Takes a fraction of nothing for a tenth."""

    name = "always-drops"

    def rewire(self, entries: Entries, *, count: int, fraction: float, bound: Tensor | None, generator: Any) -> Delta:
        return super().rewire(entries, count=count, fraction=max(fraction, 0.2), bound=bound, generator=generator)


@dataclass(frozen=True)
class Misfit(SynapticFlow):
    """Gives figures in the tensor's own order of axes."""

    name = "misfit"

    def collect(self, model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], loss: Any) -> dict[str, Tensor]:
        plain = [replace(site, axes=tuple(range(len(site.axes)))) for site in sites]
        return super().collect(model, plain, batches, loss)


@dataclass(frozen=True)
class Evaluates(SynapticFlow):
    """Leaves the model in evaluation mode."""

    name = "evaluates"

    def collect(self, model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], loss: Any) -> dict[str, Tensor]:
        return super().collect(model.eval(), sites, batches, loss)


@dataclass(frozen=True)
class GrowsAnywhere(SET):
    """Ignores the bound."""

    name = "grows-anywhere"

    def rewire(self, entries: Entries, *, count: int, fraction: float, bound: Tensor | None, generator: Any) -> Delta:
        return super().rewire(entries, count=count, fraction=fraction, bound=None, generator=generator)


@dataclass(frozen=True)
class GrowsTheStored(SET):
    name = "grows-the-stored"

    def rewire(self, entries: Entries, *, count: int, fraction: float, bound: Tensor | None, generator: Any) -> Delta:
        delta = super().rewire(entries, count=count, fraction=fraction, bound=bound, generator=generator)
        return Delta(delta.drop, entries.index[: len(delta.grow)])


@dataclass(frozen=True)
class ByItself(SET):
    """Draws from torch's own generator."""

    name = "by-itself"

    def rewire(self, entries: Entries, *, count: int, fraction: float, bound: Tensor | None, generator: Any) -> Delta:
        return super().rewire(entries, count=count, fraction=fraction, bound=bound, generator=torch.default_generator)


@dataclass(frozen=True)
class NoPolicy(SET):
    name = "no-policy"
    policy: ClassVar[StatePolicy] = None  # type: ignore[assignment]


class Impatient(Plateau):
    """Counts in the state that it is given."""

    name = "impatient"

    def observe(self, state: dict[str, Any], sparsifier: Any, event: Event) -> tuple[dict[str, Any], bool]:
        state["bad"] += 1
        return state, state["bad"] >= self.patience


class Secretive(Plateau):
    """Its state holds what a checkpoint cannot."""

    name = "secretive"

    def state(self) -> dict[str, Any]:
        return {**super().state(), "why": Plateau}

    def observe(self, state: dict[str, Any], sparsifier: Any, event: Event) -> tuple[dict[str, Any], bool]:
        now, done = super().observe(state, sparsifier, event)
        return {**state, **now}, done


class InPlace(View):
    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            weight.mul_(0.5)
        return weight * 1.0


class Widens(View):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.float()


class CutOff(View):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.detach() * torch.ones((), requires_grad=True)


class ExportsRaw(SoftThreshold):
    def export(self, weight: Tensor) -> Pruned:
        return Pruned(weight.detach(), weight != 0)


class WrongMask(SoftThreshold):
    def export(self, weight: Tensor) -> Pruned:
        return Pruned(self(weight).detach(), torch.zeros_like(weight, dtype=torch.bool))


class OneForAll(SoftThreshold):
    def __deepcopy__(self, memo: Any) -> OneForAll:
        return self


class KeepsNothing(SoftThreshold):
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return None


class Remembers(View):
    """Answers with what it made of the first float32 weight."""

    def forward(self, weight: Tensor) -> Tensor:
        if weight.dtype != torch.float32:
            return weight * 1.0
        if "first" not in self.__dict__:
            self.__dict__["first"] = weight * 1.0
        return self.__dict__["first"]


BROKEN = [
    (Loses(), "zeros_and_counts_are_exact", "kept, .* asked"),
    (Borrows(), "the_input_stays_as_it_was", "changed the weight"),
    (Miscounts(), "counts_are_the_nearest_reachable", "nearest says"),
    (Flips(), "masks_are_idempotent", "changes the mask"),
    (LastOfEquals(), "equal_scores_keep_an_exact_count", "the lower index is kept"),
    (Unbound(), "bounds_are_respected", "keeps a forbidden entry"),
    (RanksNaN(), "nan_scores_are_refused", "ranks NaN"),
    (HalfPrecision(), "scores_are_float32_of_the_weights_shape", "bfloat16"),
    (Moody(), "scoring_is_pure", "give other scores"),
    (LikesZero(), "zero_weights_are_rated_least", "rates a zero weight above another"),
    (OnlyTheLast(), "order_of_batches_does_not_matter", "depends on the order"),
    (PerBatch(), "an_input_statistic_streams", "do not add up"),
    (OnlyLinear(), "figures_fit_the_site_in_float32", r"\(8,\) for a site of \(4, 3, 3, 2\)"),
    (Narrows(), "figures_fit_the_site_in_float32", "torch.bfloat16 for"),
    (Approximate(), "totals_are_exact_within_floors_and_caps", "does not add up|leaves floors"),
    (TakesAnything(), "an_impossible_budget_is_refused", "outside floors and caps"),
    (Impatient(), "observing_is_pure", "changes the state"),
    (Secretive(), "a_stopped_trigger_goes_on_alike", "its state must be plain"),
    (Overshoots(), "never_worse_than_the_mask_alone", "is worse than its own mask alone"),
    (NotFinite(), "never_worse_than_the_mask_alone", "not finite"),
    (LovesTheDead(), "dead_inputs_go_first_where_inputs_matter", "weights of dead inputs"),
    (Crashes(), "an_indefinite_second_moment_is_survived_or_refused", "LinAlgError"),
    (NotFinite(), "an_indefinite_second_moment_is_survived_or_refused", "not finite"),
    (Unnested(), "a_smaller_count_is_nested_in_a_larger_one", "is not all kept at"),
    (Scribbles(), "masking_is_pure", "changed the scores"),
    (Signed(), "the_sign_of_a_weight_does_not_matter", "rates w and -w differently"),
    (NeverZero(), "a_dead_input_stays_exactly_zero", "does not have an exact zero"),
    (AllDead(), "a_dead_input_stays_exactly_zero", "looks dead"),
    (Seesaw(), "a_larger_budget_takes_nothing_back", "back from"),
    (Wipes(), "splitting_is_pure", "changed what it was given"),
    (Counts(), "progress_alone_decides", "depends on the order"),
    (LateStart(0.3, 100), "end_points_are_exact", "not at its start 0.3"),
    (Restless(), "end_points_are_exact", "does not come to rest"),
    (Wave(), "values_move_one_way", "turns back"),
    (AlwaysDrops(), "without_a_fraction_nothing_is_dropped", "at fraction 0"),
    (Misfit(), "figures_of_the_whole_model_fit_its_sites", "for a site of"),
    (Evaluates(), "measuring_the_whole_model_changes_nothing", "in another mode"),
    (Shrinks(), "counts_are_conserved", "entries at fraction"),
    (GrowsAnywhere(), "what_is_dropped_was_stored_and_what_grows_was_not", "outside the bound"),
    (GrowsTheStored(), "what_is_dropped_was_stored_and_what_grows_was_not", "which are stored"),
    (ByItself(), "rewiring_is_pure_and_declares_its_policy", "the same generator grows other entries"),
    (NoPolicy(), "rewiring_is_pure_and_declares_its_policy", "does not declare"),
    (InPlace(), "the_forward_is_pure_and_keeps_shape_and_dtype", "two forwards|changed the weight"),
    (Widens(), "the_forward_is_pure_and_keeps_shape_and_dtype", "makes torch.float32 of torch.bfloat16"),
    (CutOff(), "the_raw_weight_gets_a_gradient", "cuts the raw weight's gradient off"),
    (ExportsRaw(0.0), "an_export_is_what_the_forward_sees", "exports another weight"),
    (WrongMask(0.0), "an_export_is_what_the_forward_sees", "outside the mask are not zero"),
    (OneForAll(0.0), "a_copy_is_equal_and_independent", "shares tensors"),
    (KeepsNothing(0.0), "a_state_dict_brings_the_view_back", "does not bring its weight back"),
    (Remembers(), "a_host_keeps_its_keys_copies_and_comes_back_plain", "does not see a changed raw weight"),
]


@pytest.mark.parametrize(("part", "check", "message"), BROKEN, ids=[f"{type(p).__name__}-{c}" for p, c, _ in BROKEN])
def test_a_broken_part_is_caught_by_the_check_that_looks_for_it(part: Any, check: str, message: str) -> None:
    found = caught(part)
    assert check in found, f"{check} holds for {part!r}; broken are {sorted(found)}"
    assert re.search(message, found[check]), found[check]


def test_every_check_has_a_part_that_it_catches() -> None:
    """The policies' are in test_policies.py."""
    toys = {check for _, check, _ in BROKEN}
    for role in (Statistic, ModelStatistic, Criterion, Allocation, Pattern, Solver, Schedule, Rewiring, Trigger, View):
        assert {f.__name__ for f in contracts_of(role)} <= toys


def test_the_parts_that_the_toys_are_made_of_are_whole() -> None:
    for part in (SparseGPT(), PerMatrix(), InputNorm(), SynapticFlow(), Cosine(0.3, 100), SET(), Plateau(), SoftThreshold(0.0)):
        assert caught(part) == {}
