"""Optimize for a target: the fastest, smallest or leanest form of a model within a budget of loss.

Forms are found one lever at a time (bits, pruned weights, pruned and healed ones, gated activations), each density by bisection; those
that keep within the budget are stored, loaded again, and measured against one another in their engine. What is stored is what was measured.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.core.collect import collect_all
from rarefy.core.errors import BadInput
from rarefy.core.journal import Journal
from rarefy.core.records import Gating, Recipe
from rarefy.core.search import Bisect
from rarefy.hub.atomic import atomic_folder, check_target
from rarefy.hub.card import Card, Figure, write_card
from rarefy.hub.load import Loaded, load
from rarefy.hub.packed import RECORD as PACKED
from rarefy.hub.packed import save_packed
from rarefy.probes.decoding import cut, rounds_of
from rarefy.probes.perplexity import token_nll
from rarefy.probes.racers.hosted import Hosted, hosted
from rarefy.probes.timers import busy, ratio
from rarefy.runtime.choose import Chooser
from rarefy.search.forms import Form, Workshop
from rarefy.search.targets import TARGETS, Target
from rarefy.surgery.adapters import Adaptation
from rarefy.weights.checkpoint import digest
from rarefy.weights.optimize import relative_loss
from rarefy.weights.prune import dense_statistics
from rarefy.weights.sites import find_sites

RECORD = "optimize.json"
PROMPT = 8  # tokens
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Levers:
    """What may be done: layouts that round weights, that of the embeddings beside them; recipes, what heals each, and gatings, which are searched over density."""

    bits: tuple[str, ...] = ("int8", "int4", "int4-asymmetric")
    embeddings: str = "int8"
    recipes: tuple[Recipe, ...] = ()
    healings: tuple[Adaptation, ...] = ()
    gatings: tuple[Gating, ...] = ()
    tolerance: float = 0.05
    lowest: float = 0.3


@dataclass(frozen=True)
class Data:
    """Calibration batches, held-out ids int64 [N] with the BOS before each window, tokens a window, and windows int64 [1, T] to heal on."""

    batches: Sequence[Any]
    heldout: Tensor
    bos: int | None
    window: int = 512
    training: Sequence[Tensor] = ()


def optimize_for(
    loaded: Loaded,
    data: Data,
    targets: Mapping[Path, Target],
    levers: Levers,
    *,
    max_loss: float,
    layout: Chooser,
    force: bool = False,
    seed: int = 0,
    tokens: int = 32,
    rounds: int = 5,
    progress: Progress | None = None,
) -> dict[Path, dict[str, Any]]:
    """Write the best form of a model within the budget for each target to its folder; the model in memory is left as it was.

    Finished tries are kept beside the first folder until all are written, so that a run that was killed does not repeat them.

    Args:
        targets: {folder: what is won there}; all are chosen from the same measured forms.
        max_loss: relative rise in perplexity over the dense model, 0.05 for 5%; the point estimate decides.
        layout: chooses how matrices without fewer bits are stored.
        tokens, rounds: of the timing, see `rarefy.probes.decoding.race`.

    Returns:
        {folder: record}, with {max_loss, chosen, loss, interval, forms: [{form, engine, precision, density, loss, interval, ok, file_bytes, model_bytes, ms_per_token, tokens_per_s,
        base, over_base, over_base_min, over_base_max, over_dense}], tried: [{form, loss, interval, ok, reused}], threads, warning}: `forms` are
        measured as they are stored; over_base is the median ratio of the base form's time (the same bits, nothing left out) to the form's.

    Raises:
        BadInput: a negative budget, no target, or healing without windows to heal on.
        Refused: as `rarefy.hub.atomic.check_target`.
    """
    _check(targets, data, levers, max_loss, force)
    note = progress or (lambda done, all, what: None)
    loaded.model.eval()
    gates = any(target.gates for target in targets.values())
    if levers.gatings and gates:
        Workshop(data.batches, {}).split()  # refuse before anything is computed
    stats = collect_all(loaded.model, data.batches, find_sites(loaded.model), dense_statistics(levers.recipes), progress=progress) if levers.recipes else {}
    first = next(iter(targets))
    drafts = first.parent / f".{first.name}.forms"
    shutil.rmtree(drafts, ignore_errors=True)  # of a run that was killed
    tries = _Tries(loaded, data, Workshop(data.batches, stats, data.training, seed, note), max_loss, Path(f"{first}.tries.json"), note)
    try:
        found = list(dict.fromkeys(_forms(tries, levers, gates=gates)))
        folders = [_store(tries, form, drafts / str(number), layout) for number, form in enumerate(found)]
        rows = _measured(found, folders, data, max_loss, tokens, rounds, note)
        common = {"forms": rows, "tried": tries.rows, "threads": torch.get_num_threads(), "warning": busy()}
        records = {}
        for out, target in targets.items():
            best = min((row for row in rows if row["ok"]), key=target.cost)
            records[out] = {"max_loss": max_loss, "chosen": best["form"], "loss": best["loss"], "interval": best["interval"], **common}
            with atomic_folder(out, force=force) as draft:
                for file in folders[rows.index(best)].iterdir():
                    shutil.copy2(file, draft)
                (draft / RECORD).write_text(json.dumps(records[out], indent=1) + "\n")
                write_card(draft, loaded.model, _card(best, max_loss, data, packed=bool(json.loads((draft / PACKED).read_text())["packed"])))
        tries.journal.path.unlink(missing_ok=True)
        return records
    finally:
        shutil.rmtree(drafts, ignore_errors=True)


def _check(targets: Mapping[Path, Target], data: Data, levers: Levers, max_loss: float, force: bool) -> None:
    if not targets:
        raise BadInput("no target", "a search wins something", f"pass one of {', '.join(TARGETS)}")
    for out in targets:
        check_target(out, force=force)
    if max_loss < 0:
        raise BadInput(f"max_loss {max_loss}", "a budget is not negative", "pass for example 5%")
    if levers.healings and not data.training:
        raise BadInput(f"healing by {levers.healings[0].name} without text", "healing trains on windows", "pass windows to heal on")


def _card(best: dict[str, Any], max_loss: float, data: Data, *, packed: bool) -> Card:
    low, high = best["interval"]
    protocol = f"rise of perplexity over the dense model on {data.heldout.numel()} held-out tokens in windows of {data.window}; at most {max_loss:.2%} was asked"
    figures = (
        Figure("loss", f"{best['loss']:.2%} (95%: {low:.2%} to {high:.2%})", protocol),
        Figure("decoding", f"{best['tokens_per_s']:.4g} tokens/s", f"measured by {best['engine']} with {torch.get_num_threads()} threads, all forms in turn"),
    )
    return Card("optimized", (f"Searched for a form that loses little; chosen, and stored: `{best['form']}`.",), figures, RECORD, packed)


def _forms(tries: _Tries, levers: Levers, *, gates: bool) -> Iterator[Form]:
    """The forms within the budget, the dense one first; each base before what leaves something out of it."""
    bases = [Form(), *(form for layout in levers.bits if tries.good(form := Form(bits=layout, embeddings=levers.embeddings)))]
    yield from bases
    lowest = Bisect(levers.lowest, 1.0, levers.tolerance)
    made: list[Callable[[float], Form]] = [partial(_pruned, recipe, healing) for recipe in levers.recipes for healing in (None, *levers.healings)]
    made += [partial(_gated, base, gating) for base in (bases if gates else ()) for gating in levers.gatings]
    for at in made:
        density = lowest(lambda d, at=at: tries.good(at(d)))  # type: ignore[misc]
        if density < 1:
            yield at(density)


def _pruned(recipe: Recipe, healing: Adaptation | None, density: float) -> Form:
    return Form(pruning=(recipe, density), healing=healing)


def _gated(base: Form, gating: Gating, density: float) -> Form:
    return dataclasses.replace(base, gating=dataclasses.replace(gating, density=density))


@dataclass
class _Tries:
    loaded: Loaded
    data: Data
    workshop: Workshop
    max_loss: float
    path: Path
    note: Progress
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dense = self._nll()
        self.journal = Journal(self.path, digest(self.data.batches, self.data.training, self.dense))

    def good(self, form: Form) -> bool:
        """Whether the form's loss is within the budget, as its weights and gates alone make it; a finished try is not repeated."""
        key = f"{form!r}|{self.workshop.seed}"
        known = self.journal.get(key)
        row = known or self._measure(form)
        if known is None:
            self.journal.put(key, row)
        ok = row["loss"] <= self.max_loss
        self.rows.append({**row, "ok": ok, "reused": known is not None})
        return bool(ok)

    def _measure(self, form: Form) -> dict[str, Any]:
        self.note(0, 1, f"try {form}")
        with self.workshop.applied(self.loaded.model, form):
            loss = relative_loss(self.dense, self._nll())
        return {"form": str(form), "loss": loss.value, "interval": list(loss.interval)}

    def _nll(self) -> Tensor:
        return token_nll(self.loaded.model, self.data.heldout, self.data.window, None, self.data.bos)


def _store(tries: _Tries, form: Form, folder: Path, layout: Chooser) -> Path:
    tries.note(0, 1, f"store {form}")
    with tries.workshop.applied(tries.loaded.model, form) as record:
        save_packed(tries.loaded.model, tries.loaded.tokenizer, folder, form.bits or layout, embeddings=form.embeddings, gating=record.get("gating"))
    return folder


def _measured(forms: Sequence[Form], folders: Sequence[Path], data: Data, max_loss: float, tokens: int, rounds: int, note: Progress) -> list[dict[str, Any]]:
    racers = [hosted(str(form), load(str(folder)), "auto") for form, folder in zip(forms, folders, strict=True)]
    windows = cut(data.heldout, data.bos, data.window)  # as the tries were scored
    scores = []
    for number, racer in enumerate(racers):
        note(number, len(racers), f"score {racer.name}")
        scores.append(torch.cat(racer.nll(windows)))
    seconds = dict(zip(forms, rounds_of(racers, data.heldout[None, :PROMPT], tokens, rounds, note), strict=True))
    rows = zip(forms, folders, racers, scores, strict=True)
    return [_row(form, folder, racer, relative_loss(scores[0], nll), max_loss, seconds) for form, folder, racer, nll in rows]


def _row(form: Form, folder: Path, racer: Hosted, loss: Any, max_loss: float, seconds: dict[Form, list[float]]) -> dict[str, Any]:
    took = statistics.median(seconds[form])
    over_base, over_dense = (ratio(seconds[peer], seconds[form]) for peer in (form.base, Form()))
    return {
        "form": str(form),
        "engine": racer.engine,
        "precision": racer.precision,
        "density": racer.density,
        "loss": loss.value,
        "interval": list(loss.interval),
        "ok": loss.value <= max_loss,
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "model_bytes": racer.model_bytes,
        "ms_per_token": 1e3 * took,
        "tokens_per_s": 1 / took,
        "base": str(form.base),
        **{key.replace("ratio", "over_base"): value for key, value in over_base.items()},
        "over_dense": over_dense["ratio"],
    }
