"""The once-flow: statistics -> allocation -> count per site -> solver(criterion, pattern) -> weight and mask.

Two passes, as the parts ask for them: an allocation may need the whole dense model's weights or scores; a solver
needs its sites' statistics, which are collected block by block.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rarefy.core.collect import Collector, Stats, call, collect_all, collectable, valid_tokens
from rarefy.core.errors import BadInput, Refused
from rarefy.core.exact import keep_count
from rarefy.core.records import Member, Pruned, Recipe, Site, Units
from rarefy.core.roles import Allocation, Criterion, ModelStatistic, Pattern, Solver, Statistic, asks
from rarefy.weights.account import ERROR_STATISTIC, model_name, site_record, unseen
from rarefy.weights.account import relative_error as relative_error
from rarefy.weights.allocations.outlier_share import block_of
from rarefy.weights.blocks import Calls, called_before, find_chain, run_block, uncached
from rarefy.weights.checkpoint import Checkpoint, digest, pack, unpack
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.sites import find_sites
from rarefy.weights.source import Weights
from rarefy.weights.statistics import statistic as statistic

ProgressBar = Callable[[int, int, str], None]
OnPruned = Callable[[Site, Pruned], None]
WHOLE, OUTSIDE, AFTER = "the whole model", "outside the chain", "after the chain"  # labels of groups that are no block
COUNT_TOLERANCE = 0.01  # of the budget: how far a pattern's nearest counts may be from what was asked


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    density: float,
    pattern: Pattern | None = None,
    allocation: Allocation | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    mode: str = "cascade",
    statistics: Stats | None = None,
    errors: bool = True,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
    progress: ProgressBar | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    on_pruned: OnPruned | None = None,
    weights: Weights | None = None,
) -> dict[str, Any]:
    """Prune a model in place to an exact density.

    ``sum of kept weights = round(density * n)`` over the sites of `find_sites`, up to what the pattern can reach.

    Args:
        model: any module; evaluated in eval mode, its training flag is restored.
        batches: calibration batches (mappings of keywords, or input tensors); may be empty for data-free recipes.
        recipe: solver, allocation and pattern; `pattern` and `allocation` replace the recipe's.
        density: fraction of the sites' weights that is kept, in [0, 1].
        include, exclude: glob patterns over module paths, see `find_sites`.
        mode: "cascade" (a block sees what pruned blocks before it make, and a site that runs after the blocks what all of
            them make) or "parallel" (dense statistics throughout, also where the model is no chain of blocks).
        statistics: what `collect_all` gave for the dense model; nothing is collected then, as in mode "parallel".
        errors: measure reconstruction errors on the second moment of the inputs (else, without batches, and at sites
            whose inputs are not collectable, on the weight alone; then H = I).
        loss: (model, batch) -> scalar for criteria of the gradient.
        seed: of every random choice; the same seed gives the same bytes at the same number of threads.
        progress: called with (done, total, label).
        checkpoint: a folder that keeps finished blocks; the same call on the same dense model goes on from there and
            gives the same bytes (a `loss` enters the key by its qualified name alone). It is left for the caller to delete.
        on_pruned: called with every site and what the solver returned; one that is read back has its weight as stored.
        weights: where the tensors are, if not in memory (`rarefy.hub.shards.ShardedWeights`); needs a checkpoint.

    Returns:
        {model, recipe, pattern, allocation, density_requested, density, mode, seed, emptied: names of sites that keep no weight, sites: [{name, shape, kept,
        density, error_mask_only, error, error_on, ...}]}; errors are relative root errors of the site's output with the
        weights as the model stores them, sqrt(tr(D H D^T) / tr(W H W^T)), for the mask alone and with the solver's
        update, on the same statistics: `error_on` "inputs", or "weight" where H = I. `dead_inputs` counts the input
        columns that were zero in every calibration row; `idle` marks a site that saw no row.

    Raises:
        BadInput: density, pattern, batches or sites that cannot be, or a model on the meta device; the model is then
            unchanged or, in cascade mode, pruned up to the block that is named.
        Refused: the checkpoint belongs to another prune or is in use; a recipe that needs the whole model at once
            while the weights are streamed.
        BadFile: the checkpoint is truncated.

    >>> torch.manual_seed(0) and None
    >>> from rarefy.weights.criteria.magnitude import MAGNITUDE
    >>> layer = nn.Linear(4, 2)
    >>> prune(layer, [], MAGNITUDE, density=0.5)["density"], int((layer.weight != 0).sum())
    (0.5, 4)
    """
    if mode not in ("cascade", "parallel"):
        raise BadInput(f"mode {mode!r}", "a mode is 'cascade' or 'parallel'")
    batches = list(batches)
    held = checkpoint if checkpoint is None or isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    was_training = model.training
    model.eval()
    try:
        with uncached(model), held.locked() if held is not None else nullcontext():
            flow = _Flow(model, weights or Weights(model), batches, recipe, pattern or recipe.pattern, allocation or recipe.allocation, seed, errors, loss, progress)
            flow.sites = find_sites(model, include, exclude)
            flow.on_pruned = on_pruned or (lambda site, pruned: None)
            if flow.weights.streamed:
                _refuse_whole(flow.recipe.solver, flow.allocation, held)
            if held is not None:
                flow.checkpoint = held.open(_key(flow, density, tuple(include), tuple(exclude), mode, statistics))
            with flow.weights.watched():
                records = flow.run(density, mode, statistics)
    finally:
        model.train(was_training)
    kept, total = sum(r["kept"] for r in records), sum(s.numel for s in flow.sites)
    return {
        "model": model_name(model),
        "recipe": recipe.name,
        "pattern": describe(flow.pattern),
        "allocation": describe(flow.allocation),
        "density_requested": density,
        "density": kept / total,
        "mode": "parallel" if flow.dense_throughout else mode,
        "seed": seed,
        "emptied": [r["name"] for r in records if not r["kept"]],
        "sites": records,
    }


def describe(part: Any) -> str:
    """A part's name with the hyper-parameters that differ from its defaults, as the command line would take it."""
    text = getattr(part, "text", None)
    return str(text) if isinstance(text, str) else type(part).name or repr(part)


def _key(flow: _Flow, density: float, include: tuple[str, ...], exclude: tuple[str, ...], mode: str, statistics: Stats | None) -> str:
    """Everything that the bytes of a prune depend on."""
    model = flow.model
    asked = (flow.recipe, flow.pattern, flow.allocation, density, include, exclude, mode, flow.seed, flow.errors, getattr(flow.loss, "__qualname__", flow.loss))
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return digest(asked, statistics, flow.batches, flow.weights.tensors(), model, attention, torch.get_num_threads(), torch.__version__)


def _refuse_whole(solver: Solver, allocation: Allocation, checkpoint: Checkpoint | None) -> None:
    """Streamed weights serve what looks at one block at a time."""
    at_once = [n for n in asks(allocation.counts) if n in ("weights", "scores", "stats")]
    gradients = [n for n in solver.needs if statistic(n).source != "input"]
    for found, what in (
        (at_once, f"allocation {describe(allocation)} needs every site's {' and '.join(at_once)} at once"),
        (gradients, f"{' and '.join(gradients)} needs a backward pass through the whole model"),
        (solver.scope == "model", f"solver {describe(solver)} needs every weight at once"),
        (checkpoint is None, "finished blocks are kept in a checkpoint, and none was named"),
    ):
        if found:
            raise Refused("streaming the weights", what, "prune in memory (--no-stream), or choose another recipe or allocation")


class _Flow:
    """The state of one prune: what was asked and what is known so far."""

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        batches: list[Any],
        recipe: Recipe,
        pattern: Pattern,
        allocation: Allocation,
        seed: int,
        errors: bool,
        loss: Any,
        progress: ProgressBar | None,
    ) -> None:
        self.model, self.weights, self.batches = model, weights, batches
        self.recipe, self.pattern, self.allocation = recipe, pattern, allocation
        self.seed, self.loss, self.progress = seed, loss, progress or (lambda done, total, label: None)
        self.errors, self.on_inputs = errors and bool(batches), errors
        self.sites: list[Site] = []
        self.dense_throughout = False
        self.checkpoint: Checkpoint | None = None
        self.on_pruned: OnPruned = lambda site, pruned: None
        self.masks: dict[str, Tensor] = {}  # packed, of the group in hand

    def run(self, density: float, mode: str, known: Stats | None) -> list[dict[str, Any]]:
        needs = self.recipe.solver.needs
        dense: Stats = dict(known or {})
        wanted = _allocation_needs(self.recipe.solver, self.allocation)
        whole = [n for n in dict.fromkeys((*wanted, *(n for n in needs if statistic(n).source != "input"))) if n not in dense]
        if whole:
            dense.update(collect_all(self.model, self.batches, self.sites, [statistic(n) for n in whole], loss=self.loss, progress=self.progress))
        budget = self._budget(density, dense)
        needed = [n for n in needs if statistic(n).source == "input"]
        rest = list(dict.fromkeys((*needed, *((ERROR_STATISTIC,) if self.errors and self._listened(needed) else ()))))
        self.dense_throughout = known is not None
        if known is not None or not rest:
            return self._at_once(budget, dense)
        if not self.batches:
            raise BadInput(f"no calibration batches for {', '.join(rest)}", f"recipe {self.recipe.name} measures activations", "pass batches, or --calibration TEXT")
        return self._by_block(budget, dense, [s for s in map(statistic, rest) if isinstance(s, Statistic)], mode)

    def _listened(self, needed: Sequence[str]) -> list[Site]:
        """The sites whose inputs are measured: all where the solver needs it, else those that can be."""
        return [s for s in self.sites if needed or collectable(self.model.get_submodule(s.module))]

    def _at_once(self, budget: Mapping[str, int], dense: Stats) -> list[dict[str, Any]]:
        """Nothing is left to collect: solve block by block, so that a killed run has something to go on from."""
        groups: dict[str, list[Site]] = defaultdict(list)
        for site in self.sites:
            groups[WHOLE if self.recipe.solver.scope == "model" else block_of(site.name)].append(site)
        self._expect(list(groups))
        records = {}
        for done, (label, sites) in enumerate(groups.items()):
            self.progress(done, len(groups), f"prune {label}")
            records.update({r["name"]: r for r in self._group(label, sites, budget, dense)})
        self.progress(len(groups), len(groups), "prune")
        return [records[s.name] for s in self.sites]

    def _group(self, label: str, sites: Sequence[Site], budget: Mapping[str, int], stats: Stats, idle: Container[str] | None = None) -> list[dict[str, Any]]:
        with self.weights.hold([s.module for s in sites]):
            return self._restore(label, sites) or self._keep(label, sites, self._solve(sites, budget, stats, idle))

    def _weight(self, site: Site) -> Tensor:
        return site.read(self.model.get_parameter(site.key).detach())

    def _generator(self, site: Site) -> Generator:
        return Generator().manual_seed(self.seed * 2**32 + zlib.crc32(site.name.encode()))

    def _budget(self, density: float, stats: Stats) -> dict[str, int]:
        units = [Units(s.name, s.shape, (Member(s.name),)) for s in self.sites]
        total = sum(u.numel for u in units)
        target = keep_count(total, density)
        if density > 0 and not target:
            raise BadInput(f"density {density}", f"it keeps none of {total:,} weights", f"ask for at least {1 / total:.2g}")
        available: dict[str, Callable[[], Any]] = {
            "weights": lambda: {s.name: self._weight(s) for s in self.sites},
            "scores": lambda: {s.name: self._scores(s, stats) for s in self.sites},
            "stats": lambda: stats,
        }
        asked = {name: available[name]() for name in asks(self.allocation.counts) if name in available}
        counts = self.allocation.counts(units, target, **asked)
        reached = {s.name: self._nearest(s, counts[s.name]) for s in self.sites}
        if abs(sum(reached.values()) - target) > COUNT_TOLERANCE * max(target, 1) + len(units):
            got = sum(reached.values()) / sum(u.numel for u in units)
            raise BadInput(
                f"density {density} with pattern {describe(self.pattern)}", f"the nearest that the pattern reaches is {got:.4g}", f"ask for --density {got:.4g}, or another pattern"
            )
        return reached

    def _nearest(self, site: Site, count: int) -> int:
        try:
            return self.pattern.nearest(site.shape, count)
        except BadInput as error:
            raise BadInput(f"{site.name} of {error.value}", error.rule, error.remedy) from error

    def _scores(self, site: Site, stats: Stats) -> Tensor:
        criterion = _rating(self.recipe.solver)
        return criterion.scores(self._weight(site), generator=self._generator(site), **{n: stats[n][site.name] for n in asks(criterion.scores)})

    def _by_block(self, budget: Mapping[str, int], dense: Stats, statistics: list[Statistic], mode: str) -> list[dict[str, Any]]:
        chain = find_chain(self.model, self.batches[0])
        self.dense_throughout = not chain
        inside = {path: [s for s in self.sites if s.module == path or s.module.startswith(path + ".")] for path, _ in chain}
        outside = [s for s in self.sites if not any(s in group for group in inside.values())]
        early, late = outside, list[Site]()
        if outside and mode == "cascade":
            before = called_before(self.model, chain, [s.module for s in outside], self.batches[0])
            early, late = [s for s in outside if s.module in before], [s for s in outside if s.module not in before]
        self._expect([*([OUTSIDE] if early else []), *(path for path, sites in inside.items() if sites), *([AFTER] if late else [])])
        calls = self.weights.capture(chain, self.batches) if chain and mode == "parallel" else []
        records = self._outside(OUTSIDE, early, budget, dense, statistics)
        if chain and mode == "cascade":
            calls = self.weights.capture(chain, self.batches)
        for index, (path, block) in enumerate(chain):
            self.progress(index, len(chain), f"prune {path}")
            with self.weights.hold([path]):
                records += self._block(index, path, block, inside[path], calls, budget, dense, statistics, mode)
        if chain:
            self.progress(len(chain), len(chain), "prune")
        records += self._outside(AFTER, late, budget, dense, statistics)
        found = {r["name"]: r for r in records}
        return [found[s.name] for s in self.sites]

    def _outside(self, label: str, sites: list[Site], budget: Mapping[str, int], dense: Stats, statistics: list[Statistic]) -> list[dict[str, Any]]:
        """Sites that no block holds, on the inputs that the model as it is now gives them."""
        if not sites:
            return []
        stats, idle = ({}, ()) if self._finished(label) else self._collect(sites, statistics)
        return self._group(label, sites, budget, {**dense, **stats}, idle)

    def _collect(self, sites: list[Site], statistics: list[Statistic]) -> tuple[Stats, list[str]]:
        with self._collector(sites, statistics) as collector, torch.no_grad():
            for number, batch in enumerate(self.batches):
                collector.valid, collector.batch = valid_tokens(batch), number
                call(self.model, batch)
                self.progress(number + 1, len(self.batches), "calibration")
        with self.weights.hold([s.module for s in sites]):
            return collector.finish(), collector.idle()

    def _collector(self, sites: Sequence[Site], statistics: list[Statistic]) -> Collector:
        heard = self._listened([n for n in self.recipe.solver.needs if statistic(n).source == "input"])
        return Collector(self.model, [s for s in sites if s in heard], statistics)

    def _block(
        self, index: int, path: str, block: nn.Module, sites: list[Site], calls: list[Calls], budget: Mapping[str, int], dense: Stats, statistics: list[Statistic], mode: str
    ) -> list[dict[str, Any]]:
        before = [run_block(block, batch, index) for batch in calls] if mode == "parallel" and self._finished(path) else []
        found = self._restore(path, sites)
        if found is None:
            before, found = self._solve_block(index, block, sites, calls, budget, dense, statistics)
            self._keep(path, sites, found)
        for number, batch in enumerate(calls):
            batch.hidden = before[number] if mode == "parallel" else run_block(block, batch, index)
        return found

    def _solve_block(
        self, index: int, block: nn.Module, sites: list[Site], calls: list[Calls], budget: Mapping[str, int], dense: Stats, statistics: list[Statistic]
    ) -> tuple[list[Tensor], list[dict[str, Any]]]:
        outputs = []
        with self._collector(sites, statistics) as collector:
            for number, batch in enumerate(calls):
                collector.valid, collector.batch = batch.valid, number
                outputs.append(run_block(block, batch, index))
        return outputs, self._solve(sites, budget, {**dense, **collector.finish()}, collector.idle()) if sites else []

    def _expect(self, labels: list[str]) -> None:
        if self.checkpoint is not None:
            self.checkpoint.expect(labels)

    def _finished(self, label: str) -> bool:
        return self.checkpoint is not None and self.checkpoint.has(label)

    def _restore(self, label: str, sites: Sequence[Site]) -> list[dict[str, Any]] | None:
        """Write a finished group's weights back; its records, or None where it is still to be solved."""
        stored = self.checkpoint.get(label) if self.checkpoint is not None and sites else None
        if stored is None:
            return None
        tensors, records = stored
        for site, record in zip(sites, records, strict=True):
            mask = unpack(tensors[f"mask:{site.name}"], site.shape)
            pruned = Pruned(tensors[f"weight:{site.name}"], mask, tensors.get(f"bias:{site.name}"), record.get("notes", {}))
            self._write(site, pruned)
            self.on_pruned(site, pruned)
        self.weights.finished(sites, self.checkpoint)
        return records

    def _keep(self, label: str, sites: Sequence[Site], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.checkpoint is not None and sites:
            tensors = {f"mask:{name}": packed for name, packed in self.masks.items()}
            for site in sites:
                tensors[f"weight:{site.name}"] = self._weight(site).cpu().clone(memory_format=torch.contiguous_format)
                bias = self._bias(site)
                if bias is not None:
                    tensors[f"bias:{site.name}"] = bias.detach().cpu().clone()
            self.checkpoint.put(label, tensors, records)
        self.masks.clear()
        self.weights.finished(sites, self.checkpoint)
        return records

    def _solve(self, sites: Sequence[Site], budget: Mapping[str, int], stats: Stats, idle: Container[str] | None = None) -> list[dict[str, Any]]:
        """Solve and write a group; `idle` names its sites that saw no row, where the statistics themselves must tell (None)."""
        solver = self.recipe.solver
        scopes = [[s] for s in sites] if solver.scope == "matrix" else [list(sites)]
        records = []
        for scope in scopes:
            weights = {s.name: self._weight(s).float() for s in scope}
            asked = {n: {s.name: stats[n][s.name] for s in scope} for n in solver.needs}
            solved = solver.solve(weights, {s.name: budget[s.name] for s in scope}, stats=asked, pattern=self.pattern, generator=self._generator(scope[0]))
            for site in scope:
                pruned = self._checked(site, solved[site.name])
                seen = {n: known[site.name] for n, known in stats.items() if site.name in known}
                records.append(site_record(site, weights[site.name], pruned, self._weight(site).dtype, seen, unseen(seen) if idle is None else site.name in idle, self.on_inputs))
                self._write(site, pruned)
                self.on_pruned(site, pruned)
                if self.checkpoint is not None:
                    self.masks[site.name] = pack(pruned.mask)
        return records

    def _bias(self, site: Site) -> Tensor | None:
        bias = getattr(self.model.get_submodule(site.module), "bias", None)
        return bias if isinstance(bias, nn.Parameter) else None

    def _checked(self, site: Site, pruned: Pruned) -> Pruned:
        if pruned.bias is not None and self._bias(site) is None:
            raise BadInput(
                f"a bias that solver {describe(self.recipe.solver)} returned for {site.name}", "the layer has none to write it to", "exclude it, or give the layer a bias"
            )
        return pruned

    def _write(self, site: Site, pruned: Pruned) -> None:
        with torch.no_grad():
            site.write(self.model.get_parameter(site.key), pruned.weight)
            bias = self._bias(site)
            if pruned.bias is not None and bias is not None:
                bias.copy_(pruned.bias)


def dense_statistics(recipes: Sequence[Recipe]) -> list[Statistic | ModelStatistic]:
    """What must be collected on the dense model so that `prune(..., statistics=...)` can serve every recipe, errors included."""
    names = {ERROR_STATISTIC}
    for recipe in recipes:
        names |= {*recipe.solver.needs, *_allocation_needs(recipe.solver, recipe.allocation)}
    return [statistic(name) for name in sorted(names)]


def trial_key(recipe: Recipe, density: float, seed: int) -> str:
    """Names one try among those on the same model and data, by every hyper-parameter of its parts."""
    return f"{recipe.name}|{recipe.solver}|{recipe.allocation}|{recipe.pattern}|{density}|{seed}"


def _rating(solver: Solver) -> Criterion:
    """What an allocation's scores are made by: the solver's criterion, or magnitude where it has none."""
    return getattr(solver, "criterion", None) or Magnitude()


def _allocation_needs(solver: Solver, allocation: Allocation) -> tuple[str, ...]:
    return asks(_rating(solver).scores) if "scores" in asks(allocation.counts) else ()
