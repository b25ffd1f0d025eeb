"""The once-flow: statistics -> allocation -> count per site -> solver(criterion, pattern) -> weight and mask.

Two passes, as the parts ask for them: an allocation may need the whole dense model's weights or scores; a solver
needs its sites' statistics, which are collected block by block.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rarefy.core.collect import Collector, Stats, collect_all
from rarefy.core.discover import methods, pick
from rarefy.core.errors import BadInput
from rarefy.core.exact import keep_count
from rarefy.core.records import Member, Pruned, Recipe, Site, Units
from rarefy.core.roles import Allocation, Criterion, Pattern, Solver, Statistic, asks
from rarefy.weights.blocks import Calls, capture, find_chain, run_block, uncached
from rarefy.weights.checkpoint import Checkpoint, digest, pack, unpack
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.sites import find_sites

ProgressBar = Callable[[int, int, str], None]
OnPruned = Callable[[Site, Pruned], None]
ERROR_STATISTIC = "hessian"
WHOLE, OUTSIDE = "the whole model", "outside the chain"  # labels of groups that are no block
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
) -> dict[str, Any]:
    """Prune a model in place to an exact density.

    ``sum of kept weights = round(density * n)`` over the sites of `find_sites`, up to what the pattern can reach.

    Args:
        model: any module; evaluated in eval mode, its training flag is restored.
        batches: calibration batches (mappings of keywords, or input tensors); may be empty for data-free recipes.
        recipe: solver, allocation and pattern; `pattern` and `allocation` replace the recipe's.
        density: fraction of the sites' weights that is kept, in [0, 1].
        include, exclude: glob patterns over module paths, see `find_sites`.
        mode: "cascade" (a block sees what pruned blocks before it make) or "parallel" (dense statistics throughout).
        statistics: what `collect_all` gave for the dense model; nothing is collected then, as in mode "parallel".
        errors: measure reconstruction errors on the second moment of the inputs (else, and without batches,
            on the weight alone).
        loss: (model, batch) -> scalar for criteria of the gradient.
        seed: of every random choice; the same seed gives the same bytes at the same number of threads.
        progress: called with (done, total, label).
        checkpoint: a folder that keeps finished blocks; the same call on the same dense model goes on from there and
            gives the same bytes. It is left for the caller to delete.
        on_pruned: called with every site and what the solver returned; one that is read back has its weight as stored.

    Returns:
        {model, recipe, pattern, allocation, density_requested, density, mode, seed, sites: [{name, shape, kept,
        density, error_mask_only, error, ...}]}; errors are relative root errors of the site's output,
        sqrt(tr(D H D^T) / tr(W H W^T)), for the mask alone and with the solver's update, on the same statistics.

    Raises:
        BadInput: density, pattern, batches or sites that cannot be; the model is then unchanged or, in cascade
            mode, pruned up to the block that is named.
        Refused: the checkpoint belongs to another prune.
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
    was_training = model.training
    model.eval()
    try:
        with uncached(model):
            flow = _Flow(model, batches, recipe, pattern or recipe.pattern, allocation or recipe.allocation, seed, errors, loss, progress)
            flow.sites = find_sites(model, include, exclude)
            flow.on_pruned = on_pruned or (lambda site, pruned: None)
            if checkpoint is not None:
                key = _key(flow, density, tuple(include), tuple(exclude), mode, statistics)
                flow.checkpoint = (checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)).open(key)
            records = flow.run(density, mode, statistics)
    finally:
        model.train(was_training)
    kept, total = sum(r["kept"] for r in records), sum(s.numel for s in flow.sites)
    return {
        "model": str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__),
        "recipe": recipe.name,
        "pattern": describe(flow.pattern),
        "allocation": describe(flow.allocation),
        "density_requested": density,
        "density": kept / total,
        "mode": "parallel" if statistics is not None else mode,
        "seed": seed,
        "sites": records,
    }


def describe(part: Any) -> str:
    """A part's name with the hyper-parameters that differ from its defaults, as the command line would take it."""
    text = getattr(part, "text", None)
    return str(text) if isinstance(text, str) else type(part).name or repr(part)


def _key(flow: _Flow, density: float, include: tuple[str, ...], exclude: tuple[str, ...], mode: str, statistics: Stats | None) -> str:
    """Everything that the bytes of a prune depend on."""
    model = flow.model
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    asked = (flow.recipe, flow.pattern, flow.allocation, density, include, exclude, mode, flow.seed, flow.errors, getattr(flow.loss, "__qualname__", flow.loss))
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return digest(asked, statistics, flow.batches, weights, model, attention, torch.get_num_threads(), torch.__version__)


class _Flow:
    """The state of one prune: what was asked and what is known so far."""

    def __init__(
        self, model: nn.Module, batches: list[Any], recipe: Recipe, pattern: Pattern, allocation: Allocation, seed: int, errors: bool, loss: Any, progress: ProgressBar | None
    ) -> None:
        self.model, self.batches, self.recipe, self.pattern, self.allocation = model, batches, recipe, pattern, allocation
        self.seed, self.loss, self.progress = seed, loss, progress or (lambda done, total, label: None)
        self.errors = errors and bool(batches)
        self.sites: list[Site] = []
        self.params = dict(model.named_parameters())
        self.checkpoint: Checkpoint | None = None
        self.on_pruned: OnPruned = lambda site, pruned: None
        self.masks: dict[str, Tensor] = {}  # packed, of the group in hand

    def run(self, density: float, mode: str, known: Stats | None) -> list[dict[str, Any]]:
        needs = self.recipe.solver.needs
        dense: Stats = dict(known or {})
        wanted = _allocation_needs(self.recipe.solver, self.allocation)
        whole = [n for n in dict.fromkeys((*wanted, *(n for n in needs if statistic(n).source == "gradient"))) if n not in dense]
        if whole:
            dense.update(collect_all(self.model, self.batches, self.sites, [statistic(n) for n in whole], loss=self.loss, progress=self.progress))
        budget = self._budget(density, dense)
        rest = list(dict.fromkeys(n for n in (*needs, *((ERROR_STATISTIC,) if self.errors else ())) if statistic(n).source == "input"))
        if known is not None or not rest:
            self._expect([WHOLE])
            return self._restore(WHOLE, self.sites) or self._keep(WHOLE, self.sites, self._solve(self.sites, budget, dense))
        if not self.batches:
            raise BadInput(f"no calibration batches for {', '.join(rest)}", f"recipe {self.recipe.name} measures activations", "pass batches, or --calibration TEXT")
        return self._by_block(budget, dense, [statistic(n) for n in rest], mode)

    def _weight(self, site: Site) -> Tensor:
        return site.read(self.params[site.key].detach())

    def _generator(self, site: Site) -> Generator:
        return Generator().manual_seed(self.seed * 2**32 + zlib.crc32(site.name.encode()))

    def _budget(self, density: float, stats: Stats) -> dict[str, int]:
        units = [Units(s.name, s.shape, (Member(s.name),)) for s in self.sites]
        target = keep_count(sum(u.numel for u in units), density)
        available: dict[str, Callable[[], Any]] = {
            "weights": lambda: {s.name: self._weight(s) for s in self.sites},
            "scores": lambda: {s.name: self._scores(s, stats) for s in self.sites},
            "stats": lambda: stats,
        }
        asked = {name: available[name]() for name in asks(self.allocation.counts) if name in available}
        counts = self.allocation.counts(units, target, **asked)
        reached = {s.name: self.pattern.nearest(s.shape, counts[s.name]) for s in self.sites}
        if abs(sum(reached.values()) - target) > COUNT_TOLERANCE * max(target, 1) + len(units):
            got = sum(reached.values()) / sum(u.numel for u in units)
            raise BadInput(
                f"density {density} with pattern {describe(self.pattern)}", f"the nearest that the pattern reaches is {got:.4g}", f"ask for --density {got:.4g}, or another pattern"
            )
        return reached

    def _scores(self, site: Site, stats: Stats) -> Tensor:
        criterion = _rating(self.recipe.solver)
        return criterion.scores(self._weight(site), generator=self._generator(site), **{n: stats[n][site.name] for n in asks(criterion.scores)})

    def _by_block(self, budget: Mapping[str, int], dense: Stats, statistics: list[Statistic], mode: str) -> list[dict[str, Any]]:
        chain = find_chain(self.model, self.batches[0])
        inside = {path: [s for s in self.sites if s.module == path or s.module.startswith(path + ".")] for path, _ in chain}
        outside = [s for s in self.sites if not any(s in group for group in inside.values())]
        self._expect([*([OUTSIDE] if outside else []), *(path for path, sites in inside.items() if sites)])
        records = {}
        if outside:
            found = self._restore(OUTSIDE, outside)
            if found is None:
                extra = collect_all(self.model, self.batches, outside, statistics, progress=self.progress)
                found = self._keep(OUTSIDE, outside, self._solve(outside, budget, {**dense, **extra}))
            records.update({r["name"]: r for r in found})
        calls = capture(self.model, chain, self.batches) if chain else []
        for index, (path, block) in enumerate(chain):
            self.progress(index, len(chain), f"prune {path}")
            records.update({r["name"]: r for r in self._block(index, path, block, inside[path], calls, budget, dense, statistics, mode)})
        if chain:
            self.progress(len(chain), len(chain), "prune")
        return [records[s.name] for s in self.sites]

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
        with Collector(self.model, sites, statistics) as collector:
            for number, batch in enumerate(calls):
                collector.valid, collector.batch = batch.valid, number
                outputs.append(run_block(block, batch, index))
        found = self._solve(sites, budget, {**dense, **collector.finish()}) if sites else []
        idle = set(collector.idle())
        return outputs, [{**r, "idle": True} if r["name"] in idle else r for r in found]

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
        return records

    def _solve(self, sites: Sequence[Site], budget: Mapping[str, int], stats: Stats) -> list[dict[str, Any]]:
        solver = self.recipe.solver
        scopes = [[s] for s in sites] if solver.scope == "matrix" else [list(sites)]
        records = []
        for done, scope in enumerate(scopes):
            weights = {s.name: self._weight(s).float() for s in scope}
            asked = {n: {s.name: stats[n][s.name] for s in scope} for n in solver.needs}
            solved = solver.solve(weights, {s.name: budget[s.name] for s in scope}, stats=asked, pattern=self.pattern, generator=self._generator(scope[0]))
            for site in scope:
                records.append(self._record(site, weights[site.name], solved[site.name], stats.get(ERROR_STATISTIC, {}).get(site.name)))
                self._write(site, solved[site.name])
                self.on_pruned(site, solved[site.name])
                if self.checkpoint is not None:
                    self.masks[site.name] = pack(solved[site.name].mask)
            if len(scopes) == len(self.sites):
                self.progress(done + 1, len(scopes), f"prune {scope[0].name}")
        return records

    def _bias(self, site: Site) -> Tensor | None:
        return self.params.get(f"{site.module}.bias" if site.module else "bias")

    def _write(self, site: Site, pruned: Pruned) -> None:
        with torch.no_grad():
            site.write(self.params[site.key], pruned.weight)
            bias = self._bias(site)
            if pruned.bias is not None and bias is not None:
                bias.copy_(pruned.bias)

    def _record(self, site: Site, weight: Tensor, pruned: Pruned, hessian: Tensor | None) -> dict[str, Any]:
        kept = int(pruned.mask.sum())
        return {
            "name": site.name,
            "shape": list(site.shape),
            "kept": kept,
            "density": kept / site.numel,
            "error_mask_only": relative_error(weight, torch.where(pruned.mask, weight, 0.0), hessian),
            "error": relative_error(weight, pruned.weight.float(), hessian),
            **({"notes": dict(pruned.notes)} if pruned.notes else {}),
        }


def relative_error(weight: Tensor, new: Tensor, hessian_CC: Tensor | None) -> float:
    """sqrt(tr(D H D^T) / tr(W H W^T)) with D = W - W' and H = I where it is None; 0 for a site without signal.

    >>> relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]]), None)
    0.6
    """

    def energy(matrix: Tensor) -> float:
        flat = matrix.reshape(matrix.shape[0], -1)
        product = flat if hessian_CC is None else flat @ hessian_CC
        return float((product.double() * flat.double()).sum().clamp(min=0.0))

    signal = energy(weight)
    return (energy(weight - new) / signal) ** 0.5 if signal > 0 else 0.0


def dense_statistics(recipes: Sequence[Recipe]) -> list[Statistic]:
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


def statistic(name: str) -> Statistic:
    """The discovered statistic of that name."""
    return pick(methods(Statistic), name, "statistic")()
