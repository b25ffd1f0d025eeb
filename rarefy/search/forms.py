"""A form: what is done to a model before it is stored, each step undone exactly afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.activations.apply import apply_gating
from rarefy.core.attach import detach_gates
from rarefy.core.collect import Stats
from rarefy.core.errors import BadInput
from rarefy.core.records import Gating, Recipe
from rarefy.core.search import trial
from rarefy.hub.packed import matrix, packed_kind
from rarefy.layouts import LAYOUTS
from rarefy.surgery.adapters import Adaptation
from rarefy.surgery.heal import Training, Watch, heal
from rarefy.weights.prune import describe, prune
from rarefy.weights.sites import find_sites

HELDOUT = 4  # of so many calibration windows one is kept back, to measure a gating on


@dataclass(frozen=True)
class Form:
    """One way to store and run a model; each part None where nothing is done.

    pruning: recipe and density; healing: what learns afterwards. bits: layout of the blocks' matrices; embeddings: that of the embedding and the output head.
    gating: with its density.

    >>> str(Form()), str(Form(bits="int4", embeddings="int8"))
    ('dense', 'int4, embeddings int8')
    """

    pruning: tuple[Recipe, float] | None = None
    healing: Adaptation | None = None
    bits: str | None = None
    embeddings: str | None = None
    gating: Gating | None = None

    def __str__(self) -> str:
        pruned = None if self.pruning is None else f"{self.pruning[0].name} ({describe(self.pruning[0].allocation)}) at {self.pruning[1]:.3g}"
        healed = None if self.healing is None else f"healed by {self.healing.name}"
        gated = None if self.gating is None else f"{self.gating.name} at {self.gating.density:.3g}"
        return ", ".join(part for part in (pruned, healed, self.bits, self.embeddings and f"embeddings {self.embeddings}", gated) if part) or "dense"

    @property
    def base(self) -> Form:
        """What it is held against: the same bits, nothing left out."""
        return dataclasses.replace(self, pruning=None, healing=None, gating=None)


@dataclass(frozen=True)
class Workshop:
    """What forms are made with: calibration batches, the dense model's statistics of them, windows to heal on, a seed; told of healing's steps."""

    batches: Sequence[Any]
    stats: Stats
    windows: Sequence[Tensor] = ()
    seed: int = 0
    progress: Watch | None = None

    @contextmanager
    def applied(self, model: Any, form: Form) -> Iterator[dict[str, Any]]:
        """Inside, the model computes as the form says; afterwards every bit is as before. Yields what was recorded: {prune, heal, gating}.

        The weights are rounded as the layout rounds them; a layout gives rounded weights back as they are, so that they are stored from here.
        """
        record: dict[str, Any] = {}
        with trial(model):
            if form.pruning is not None:
                recipe, density = form.pruning
                record["prune"] = prune(model, [], recipe, density=density, statistics=self.stats, errors=False, seed=self.seed)
            if form.healing is not None:
                record["heal"] = heal(model, self.windows, form.healing, training=Training(seed=self.seed), progress=self.progress)
            with torch.no_grad():
                for weight, layout in _rounded(model, form):
                    weight.copy_(_through(weight, layout))
            try:
                if form.gating is not None:
                    record["gating"] = apply_gating(model, form.gating, *self.split())
                yield record
            finally:
                detach_gates(model)

    def split(self) -> tuple[list[Any], list[Any]]:
        """Batches that a gating is calibrated on, and those that it is measured on."""
        if len(self.batches) < 2:
            raise BadInput(f"{len(self.batches)} calibration windows", "a gating is calibrated on some and measured on others", "ask for more calibration tokens, or try no gates")
        heldout = list(self.batches[HELDOUT - 1 :: HELDOUT]) or list(self.batches[-1:])
        seen = {id(batch) for batch in heldout}
        return [batch for batch in self.batches if id(batch) not in seen], heldout


def _rounded(model: Any, form: Form) -> Iterator[tuple[Tensor, str]]:
    """Every matrix that loses bits, as [out, in], once."""
    if form.bits is not None and not LAYOUTS[form.bits].lossless:
        for site in find_sites(model):
            module: nn.Module = model.get_submodule(site.module)
            if packed_kind(module) is not None:
                yield matrix(module), form.bits
    if form.embeddings is not None and not LAYOUTS[form.embeddings].lossless:
        for weight in {id(end.weight): end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}.values():
            yield weight, form.embeddings


def _through(weight: Tensor, layout: str) -> Tensor:
    chosen = LAYOUTS[layout]
    return chosen.unpack(chosen.pack(weight.contiguous()), (weight.shape[0], weight.shape[1]), weight.dtype)
