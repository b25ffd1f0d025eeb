"""Pruned beats dense: a phase ends when cutting the model costs nothing any more, and the best cut is remembered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.core.collect import undisturbed
from rarefy.core.errors import BadInput
from rarefy.core.exact import keep_count, topk_mask
from rarefy.core.modes import evaluating
from rarefy.core.records import Event, Paper
from rarefy.core.roles import Trigger
from rarefy.weights.actions import Remember
from rarefy.weights.allocations.global_scores import Global

PAPER = Paper(
    "hypersparse",
    "HyperSparse Neural Networks: Shifting Exploration to Exploitation through Adaptive Regularization",
    "arXiv 2308.07163",
    (
        "dense and pruned model are compared by their mean loss over the calibration batches, at the same step; the paper compares accuracies over the training set",
        "a hundredth of the steps stands for two epochs, and the recipe begins at a strength of 2e-3 (the class at 5e-6); the regularised stage ends after two fifths of the steps at the latest, where the paper sets no bound",
        "exact counts: ties at the threshold go to the lower index",
    ),
)


@dataclass(frozen=True)
class PrunedBeatsDense(Trigger):
    """Done when the best mean of the pruned model's figure over a window of rounds is below the dense model's of this round.

    ``best = min over rounds r of mean(pruned_(r-2b), ..., pruned_r);  done where best < dense_r, or after `limit` rounds``

    A round is an event "round" with the figures `pruned` and `dense` (smaller is better; without `dense` it never beats).
    Every `every` steps of a phase the trigger makes one itself: the mean loss over the sparsifier's batches in eval mode, of the model
    and of the model cut to `density` by magnitude over all sites together; weights, buffers and random state stay as they were.
    The middle of the best window is remembered under `best`, uncut: entering a phase with `Rewind` and the same density cuts it.

    Raises:
        BadInput: a density outside (0, 1], a limit shorter than a window, or a sparsifier without batches.

    Source: Ott et al., arXiv 2308.07163, the stop of adaptive regularized training.

    >>> t, rounds = PrunedBeatsDense(half=0), [Event("round", 0, {"pruned": p, "dense": d}) for p, d in ((3., 1.), (2., 1.5), (4., 2.5))]
    >>> state, done = t.state(), []
    >>> for event in rounds:
    ...     state, now = t.observe(state, None, event)
    ...     done.append(now)
    >>> done
    [False, False, True]
    """

    density: float = 0.1
    every: int = 100
    half: int = 1
    limit: int = 10_000
    best: str = "best cut"
    name = "pruned-beats-dense"
    paper = PAPER
    kind = "round"
    figure = "pruned"

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0 or self.every < 1:
            raise BadInput(f"density {self.density}, every {self.every}", "a density lies in (0, 1] and a round has at least one step", "pass for example density=0.1, every=100")
        if self.half < 0 or self.limit < self.window:
            raise BadInput(f"limit {self.limit}", f"a window has {self.window} rounds, and the phase at least one window", "train for more steps")

    @property
    def window(self) -> int:
        return 2 * self.half + 1

    def state(self) -> dict[str, Any]:
        return {"pruned": [], "rounds": 0, "best": None}

    def observe(self, state: dict[str, Any], sparsifier: Any, event: Event) -> tuple[dict[str, Any], bool]:
        if event.kind == "step" and sparsifier is not None and sparsifier.progress.phase_step % self.every == 0:
            event = Event(self.kind, event.step, self._measure(sparsifier))
        if event.kind != self.kind or self.figure not in event.data:
            return state, False
        rounds = state["rounds"] + 1
        pruned = [*state["pruned"], float(event.data["pruned"])][-self.window :]
        mean, best = sum(pruned) / len(pruned), state["best"]
        better = len(pruned) == self.window and (best is None or mean < best)
        best = mean if better else best
        beaten = best is not None and best < event.data.get("dense", float("-inf"))
        done = beaten or rounds >= self.limit
        if sparsifier is not None:
            self._remember(sparsifier, rounds, better, done)
        return {"pruned": pruned, "rounds": rounds, "best": best}, done

    def _remember(self, sparsifier: Any, rounds: int, better: bool, done: bool) -> None:
        """The last half window is kept, so that its middle is there when the window ends."""
        names = [f"{self.best}: {r % (self.half + 1)}" for r in range(rounds - self.half, rounds + 1)]
        Remember(names[-1])(sparsifier)
        if better:
            sparsifier.anchors[self.best] = sparsifier.anchors[names[0]]
        for name in names if done else ():
            sparsifier.anchors.pop(name, None)

    def _measure(self, sparsifier: Any) -> dict[str, float]:
        if not sparsifier.batches or sparsifier.batch_loss is None:
            raise BadInput("a sparsifier without batches", "the trigger compares losses over them", "pass batches= and batch_loss=, or announce boundary('round', pruned=, dense=)")
        dense = _loss(sparsifier)
        with _cut(sparsifier.weights, _largest(sparsifier, self.density)):
            return {"dense": dense, "pruned": _loss(sparsifier)}


@torch.no_grad()
def _loss(sparsifier: Any) -> float:
    model = sparsifier.model
    with evaluating(model), undisturbed(model):
        return sum(float(sparsifier.batch_loss(model, batch)) for batch in sparsifier.batches) / len(sparsifier.batches)


@contextmanager
def _cut(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Iterator[None]:
    held = {key: w.detach().clone() for key, w in weights.items()}
    with torch.no_grad():
        try:
            for key, w in weights.items():
                w.masked_fill_(~masks[key], 0.0)
            yield
        finally:
            for key, w in weights.items():
                w.copy_(held[key])


def _largest(sparsifier: Any, density: float) -> dict[str, Tensor]:
    """The masks of the largest magnitudes over all sites together, within what bounds them."""
    support = sparsifier.support
    units = support.units()
    sizes = {key: support.read(key, w.detach().abs()) for key, w in sparsifier.weights.items()}
    budget = min(keep_count(sum(u.numel for u in units), density), sum(u.limit for u in units))
    counts = Global().counts(units, budget, scores=sizes)
    return {key: support.back(key, topk_mask(size, counts[key], support.bound(key))) for key, size in sizes.items()}
