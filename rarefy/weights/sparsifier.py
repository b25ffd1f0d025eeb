"""The step-flow: phases hung on the optimizer's step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.core.attach import attach_view, detach, viewed
from rarefy.core.collect import Stats, collect_all, undisturbed
from rarefy.core.errors import BadInput, Refused
from rarefy.core.exact import keep_count
from rarefy.core.records import Delta, Entries, Event, Phase, Progress, Site, StatePolicy
from rarefy.core.roles import Trigger, asks
from rarefy.weights.allocations.uniform import Uniform
from rarefy.weights.patterns.unstructured import PerMatrix
from rarefy.weights.penalties import ActivationPenalty, DualPenalty, GradientPenalty, LossPenalty, ProximalPenalty
from rarefy.weights.sites import find_sites
from rarefy.weights.statistics import statistic
from rarefy.weights.support import Support, apply, between, moments
from rarefy.weights.taps import Taps
from rarefy.weights.views.masked import Masked

_KEEP = StatePolicy(drop_weight="keep", grow_weight="keep")


class Sparsifier:
    """Sparse training inside the user's own loop.

    ``sp = Sparsifier(model, phases, sites=keys, total=steps); sp.attach(optimizer)``, then ``sp.loss(task).backward()``.

    Args:
        phases: one Phase or several, in order.
        sites: parameter names (or Sites); default: the weights of every Linear and Conv.
        total: optimizer steps of the whole training.
        seed: of the random choices.
        batches, batch_loss: what criteria that ask for statistics are measured on, see `collect_all`; at every choice of masks anew.

    A phase of no steps (``until=0``) chooses its masks and ends as it is entered; the last phase lasts to the end in any case.
    A phase's allocation may ask for the sites' `weights`, the criterion's `scores` or `generator`; none is Uniform.
    A phase with a criterion and `enforce=False` keeps the values under the mask (they may return); with
    `enforce=True` they are zero. A mask is recomputed at the steps where the density asks for another count.

    Raises:
        BadInput: no phases, or a site that is no parameter.
        Refused: at a step, where a penalty acts in the loss and `loss` was not called.
    """

    def __init__(
        self,
        model: nn.Module,
        phases: Phase | Sequence[Phase],
        *,
        sites: Iterable[str | Site] | None = None,
        total: int = 1,
        seed: int = 0,
        batches: Sequence[Any] = (),
        batch_loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        self.model, self.phases = model, (phases,) if isinstance(phases, Phase) else tuple(phases)
        if not self.phases:
            raise BadInput("no phases", "training has at least one phase")
        keys = default_sites(model) if sites is None else tuple(s if isinstance(s, str) else s.key for s in sites)
        known = dict(model.named_parameters())
        for key in keys:
            if key not in known:
                raise BadInput(f"site {key!r}", "a site is a parameter of the model", "take names from model.named_parameters()")
        self.weights = {key: known[key] for key in keys}
        self.support = Support(self.weights, axes_of(model))
        self.progress = Progress(total=total)
        self.ledger: list[Event] = []
        self.anchors: dict[str, dict[str, Tensor]] = {}  # {name: the model's tensors at some moment}, see rarefy.weights.actions
        self.generator = torch.Generator().manual_seed(seed)
        self.batches, self.batch_loss = batches, batch_loss
        self.optimizer: Optimizer | None = None
        self._trigger: dict[str, Any] = {}
        self._budget: int | None = None  # what the masks were last chosen for
        self._counts: dict[str, int] = {}  # how it was split; a rewiring may miss them, and aims at them again
        self._rated: dict[str, Tensor] | None = None  # scores of the choice in hand: rated once for the allocation and the masks
        self._duals: dict[int, dict[str, Tensor]] = {}  # by the penalty's place in the phase
        self._held: dict[str, Tensor] = {}
        self._asked = False  # whether `loss` was called since the last step
        self.taps = Taps(model)
        self._arm()
        self._enter()
        self._pass()

    @property
    def phase(self) -> Phase:
        return self.phases[self.progress.phase]

    def attach(self, optimizer: Optimizer) -> Sparsifier:
        """Hang on one optimizer's steps. Refused: a second optimizer, or one that does not own every site."""
        if self.optimizer is not None:
            raise Refused("a second optimizer", "one step of the sparsifier is one step of one optimizer", "put all sites in one optimizer, or use one Sparsifier for each")
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        stray = [key for key, w in self.weights.items() if id(w) not in owned]
        if stray:
            raise Refused(f"sites {', '.join(stray)}", "the optimizer must own every site", "pass `sites=` or build the optimizer from model.parameters()")
        self.optimizer = optimizer
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        return self

    def loss(self, task: Tensor, *, token_mask: Tensor | None = None, **seen: Any) -> Tensor:
        """The task's loss plus what penalties and views add; the same tensor where nothing is added.

        Args:
            token_mask: bool, the leading axes of the tapped activations; False = padding.
            seen: observations that a dual penalty asks for by name; it ascends at every call.

        Raises:
            BadInput: a dual penalty asks for what nobody gives, or no tapped module ran since the last loss.
        """
        self._asked = True
        total = task
        for index, penalty in enumerate(self.phase.penalties):
            if isinstance(penalty, DualPenalty):
                total = total + self._dual(index, penalty, seen)
        for penalty in self.phase.penalties:
            if isinstance(penalty, LossPenalty):
                total = total + penalty.loss(self.weights, self.progress)
        for activation, inputs in self.taps.take():
            total = total + activation.loss(inputs, self.progress, token_mask)
        for weight, view in viewed(self.model).values():
            extra = view.extra_loss(weight)
            total = total if isinstance(extra, float) and extra == 0.0 else total + extra
        return total

    def _dual(self, index: int, penalty: DualPenalty, seen: Mapping[str, Any]) -> Tensor:
        have: dict[str, Any] = {"weights": self.weights, **seen}
        views = {key: getattr(view, "expected_nnz", None) for key, (_, view) in viewed(self.model).items()}
        expected = {key: count() for key, count in views.items() if count is not None}
        have |= {"expected_nnz": expected} if expected else {}
        absent = sorted({*asks(penalty.ascend), *asks(penalty.loss)} - set(have))
        if absent:
            raise BadInput(
                f"penalty {penalty.name!r}", f"it asks for {', '.join(absent)}, which nobody gives", "pass it to sp.loss(task, name=value), or attach views that can tell"
            )
        self._duals[index] = penalty.ascend(self._duals.get(index) or penalty.start(), self.progress, **{name: have[name] for name in asks(penalty.ascend)})
        return penalty.loss(self._duals[index], self.progress, **{name: have[name] for name in asks(penalty.loss)})

    def boundary(self, kind: str, **data: Any) -> None:
        """Tell triggers that something ended: an epoch, a task, a data set, with plain figures."""
        event = Event(kind, self.progress.step, data)
        self.ledger.append(event)
        counts = {**self.progress.counts, kind: self.progress.counts.get(kind, 0) + 1}
        self.progress = replace(self.progress, counts=counts)
        self._observe(event)

    def _observe(self, event: Event) -> None:
        until = self.phase.until
        if isinstance(until, Trigger):
            self._trigger, done = until.observe(self._trigger or until.state(), self, event)
            if done:
                self._advance()

    def state_dict(self) -> dict[str, Any]:
        """Masks, anchors and generator as tensors, the rest as plain JSON values."""
        return {
            "masks": self.support.state_dict(),
            "outer": {key: mask.clone() for key, mask in self.support.outer.items()},
            "anchors": {name: dict(tensors) for name, tensors in self.anchors.items()},
            "generator": self.generator.get_state(),
            "progress": asdict(self.progress),
            "budget": self._budget,
            "counts": dict(self._counts),
            "duals": {str(index): {name: value.tolist() for name, value in state.items()} for index, state in self._duals.items()},
            "trigger": copy.deepcopy(self._trigger),
            "ledger": [asdict(event) for event in self.ledger],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume. Order: model, sparsifier, optimizer; `enter` of the phase is not run again."""
        self.support.load_state_dict(state["masks"])
        self.support.outer = dict(state["outer"])
        self.anchors = {name: dict(tensors) for name, tensors in state["anchors"].items()}
        self.generator.set_state(state["generator"])
        self.progress = Progress(**state["progress"])
        self._budget, self._counts = state["budget"], dict(state["counts"])
        self._duals = {int(index): self._dual_state(int(index), values) for index, values in state["duals"].items()}
        self._trigger = copy.deepcopy(state["trigger"])
        self.ledger = [Event(**event) for event in state["ledger"]]
        self._arm()

    def _dual_state(self, index: int, values: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: torch.tensor(values[name], dtype=like.dtype) for name, like in self.phase.penalties[index].start().items()}

    # -- phases
    def _arm(self) -> None:
        keeps = self.phase.criterion is not None and not self.phase.enforce
        present = viewed(self.model)
        ours = {key: view for key, (_, view) in present.items() if isinstance(view, Masked) and key in self.weights}
        if keeps and not ours:
            for key, mask in self.support.masks.items():
                attach_view(self.model, key, Masked(mask))
        elif ours and not keeps:
            others = {key: view for key, view in detach(self.model).items() if key not in ours}
            for key, view in others.items():
                attach_view(self.model, key, view)
        if self.phase.trainable is not None:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(self.phase.trainable(name))
        self.taps.arm([p for p in self.phase.penalties if isinstance(p, ActivationPenalty)])
        self._knobs()

    def _enter(self) -> None:
        for action in self.phase.enter:
            action(self)
        self._budget, self._counts = None, {}
        self._remask()
        self._zero_outside()

    def _advance(self) -> None:
        if self.progress.phase + 1 < len(self.phases):
            self._next()
            self._pass()

    def _next(self) -> None:
        self.progress = replace(self.progress, phase=self.progress.phase + 1, phase_step=0)
        self._trigger, self._duals = {}, {}
        self._arm()
        self._enter()
        self.boundary("phase", name=self.phase.name)

    def _pass(self) -> None:
        """Phases of no steps end as they are entered."""
        while self.phase.until == 0 and self.progress.phase + 1 < len(self.phases):
            self._next()

    def _knobs(self) -> None:
        values = {name: schedule(self.progress) for name, schedule in self.phase.knobs.items()}
        for _, view in viewed(self.model).values():
            view.knobs.update(values)

    # -- masks
    def _allocate(self) -> bool:
        """Split the budget anew where the density asks for another total; whether that asks for other counts than there are."""
        if self.phase.density is None:
            return False
        units = self.support.units()
        budget = min(keep_count(sum(u.numel for u in units), self.phase.density(self.progress)), sum(u.limit for u in units))
        if budget == self._budget:
            return False
        self._budget, self._rated = budget, None
        allocation = self.phase.allocation or Uniform()
        have: dict[str, Callable[[], Any]] = {"weights": self._read, "scores": self._scores}
        self._refuse_unknown(f"allocation {allocation!r}", allocation.counts, have)
        stats = {name: have[name]() for name in asks(allocation.counts)}
        if "generator" in inspect.signature(allocation.counts).parameters:
            stats["generator"] = self.generator
        self._counts = allocation.counts(units, budget, **stats)
        return self._counts != self.support.counts()

    @staticmethod
    def _refuse_unknown(what: str, method: Callable[..., Any], have: Mapping[str, Any]) -> None:
        absent = [name for name in asks(method) if name not in have]
        if absent:
            raise BadInput(
                what, f"it asks for {', '.join(absent)}, which training does not collect", "use one that rates the weights themselves, or prune with calibration batches"
            )

    def _read(self) -> dict[str, Tensor]:
        return {key: self.support.read(key, weight.detach()) for key, weight in self.weights.items()}

    def _scores(self) -> dict[str, Tensor]:
        if self.phase.criterion is None:
            raise BadInput(f"phase {self.phase.name!r}", "an allocation that asks for scores needs the phase's criterion", "state a criterion or another allocation")
        if self._rated is None:
            scores, stats = self.phase.criterion.scores, self._statistics(asks(self.phase.criterion.scores))
            self._rated = {key: scores(weight, generator=self.generator, **{name: found[key] for name, found in stats.items()}) for key, weight in self._read().items()}
        return self._rated

    def _statistics(self, names: Sequence[str]) -> Stats:
        """What the criterion asks for, of the model as it is now; the model's buffers and the random state stay as they were."""
        if not names:
            return {}
        if not self.batches:
            raise BadInput(
                f"criterion {self.phase.criterion!r}", f"it asks for {', '.join(names)}, which training does not collect without batches", "pass batches= and batch_loss="
            )
        with undisturbed(self.model):
            return collect_all(self.model, self.batches, self._sites(), [statistic(name) for name in names], loss=self.batch_loss)

    def _sites(self) -> list[Site]:
        return [Site(key, module, name, self.support.shape(key), self.support.axes[key]) for key in self.weights for module, _, name in [key.rpartition(".")]]

    def _remask(self) -> None:
        """Choose anew from the criterion, at the steps where the density asks for other counts."""
        phase = self.phase
        if phase.criterion is None:
            return
        if not self._allocate():
            return
        pattern = phase.pattern or PerMatrix()
        for key, scores in self._scores().items():
            mask = self.support.back(key, pattern.mask(scores, pattern.nearest(tuple(scores.shape), self._counts[key]), self.support.bound(key)))
            self._change(key, between(self.support.masks[key], mask), StatePolicy() if phase.enforce else _KEEP)
        self._rated = None
        self._note("mask")

    def _rewire(self) -> bool:
        """Rewire if due; True where that takes the place of the optimizer's step."""
        phase, p = self.phase, self.progress
        if phase.rewiring is None or p.phase_step == 0 or p.phase_step % phase.every:
            return False
        fraction, changed = (0.0 if phase.fraction is None else phase.fraction(p)), self._allocate()
        if fraction == 0.0 and not changed:
            return False
        counts = self._counts or self.support.counts()
        for key in self.weights:
            self._change(key, self._delta(key, counts[key], fraction), phase.rewiring.policy)
        self._note("rewire")
        policy: StatePolicy = phase.rewiring.policy
        return policy.at == "instead"

    def _delta(self, key: str, count: int, fraction: float) -> Delta:
        """What the rewiring asks of a site, which it sees as [O, ..., I], at positions of the site's own tensor."""
        parameter, rewiring = self.weights[key], self.phase.rewiring
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        mask, weight = (self.support.read(key, t) for t in (self.support.masks[key], parameter.detach()))
        entries = Entries(weight[mask], mask.flatten().nonzero()[:, 0], tuple(mask.shape))
        have = {"gradient": self.support.read(key, gradient), "weight": weight, "final": key == next(reversed(self.weights))}
        asked = {name: have[name] for name in asks(rewiring.rewire) if name in have}
        delta: Delta = rewiring.rewire(entries, count=count, fraction=fraction, bound=self.support.bound(key), generator=self.generator, **asked)
        place = self.support.read(key, torch.arange(mask.numel(), device=mask.device).view(parameter.shape)).flatten()
        return Delta(place[delta.drop], place[delta.grow], delta.fill)

    def _change(self, key: str, delta: Delta, policy: StatePolicy) -> None:
        apply(delta, self.support.masks[key], self.weights[key], policy, self.optimizer)

    def _note(self, kind: str) -> None:
        self.boundary(kind, nnz=self.support.counts())

    @torch.no_grad()
    def _zero_outside(self) -> None:
        if self.phase.enforce:
            for key, weight in self.weights.items():
                weight.masked_fill_(~self.support.masks[key], 0.0)

    # -- the optimizer's step
    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if getattr(optimizer, "grad_scale", None) is not None:
            raise Refused(
                "a fused optimizer under GradScaler", "its gradients are still scaled when the sparsifier sees them", "call scaler.unscale_(optimizer) before scaler.step"
            )
        if not self._asked and any(isinstance(p, (LossPenalty, DualPenalty, ActivationPenalty)) for p in self.phase.penalties):
            raise Refused("a step without sp.loss", "the phase has penalties that act in the loss, and would train without them", "call sp.loss(task).backward()")
        self._asked = False
        self._set_rate(optimizer)
        if self.phase.rewiring is None:
            self._remask()
        if self._rewire():
            optimizer.zero_grad(set_to_none=True)
        self._edit_gradients()
        self._held = {key: w.detach().clone() for key, w in self.weights.items()}
        for key, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(~self.support.masks[key], 0.0)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._proximal(optimizer)
        for key, weight in self.weights.items():
            mask = self.support.masks[key]
            weight.copy_(torch.where(mask, weight, 0.0 if self.phase.enforce else self._held[key]))
            for moment in moments(optimizer, weight):
                moment.masked_fill_(~mask, 0.0)
        p = self.progress
        self.progress = replace(p, step=p.step + 1, phase_step=p.phase_step + 1)
        for weight, view in viewed(self.model).values():
            view.refresh(weight, self.progress)
        self._knobs()
        if isinstance(self.phase.until, int) and self.progress.phase_step >= self.phase.until:
            self._advance()
        else:
            self._observe(Event("step", self.progress.step, {}))  # not in the ledger

    def _set_rate(self, optimizer: Optimizer) -> None:
        """The phase's factor on the learning rate that each group started with."""
        if self.phase.rate is not None:
            factor = self.phase.rate(self.progress)
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def _edit_gradients(self) -> None:
        for penalty in self.phase.penalties:
            if isinstance(penalty, GradientPenalty):
                gradients = {key: w.grad for key, w in self.weights.items() if w.grad is not None}
                for key, value in penalty.edit(self.weights, gradients, self.support.masks, self.progress).items():
                    gradients[key].copy_(value)

    def _proximal(self, optimizer: Optimizer) -> None:
        rates = {id(w): float(group["lr"]) for group in optimizer.param_groups for w in group["params"]}
        for penalty in self.phase.penalties:
            if isinstance(penalty, ProximalPenalty):
                values = penalty.prox(self.weights, {k: rates[id(w)] for k, w in self.weights.items()}, self.progress)
                for key, value in values.items():
                    self.weights[key].copy_(value)


def axes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """{key: axes that bring the tensor to [O, ..., I]} of the layers whose order of axes is known."""
    try:
        return {site.key: site.axes for site in find_sites(model, include=("*",)) if site.expert is None}
    except BadInput:  # a model of bare parameters
        return {}


def default_sites(model: nn.Module) -> tuple[str, ...]:
    """The weight keys of every Linear and Conv of the model, in order."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    owned = {id(m.weight) for m in model.modules() if isinstance(m, kinds)}
    return tuple(name for name, p in model.named_parameters() if id(p) in owned)
