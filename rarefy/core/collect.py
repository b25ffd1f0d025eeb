"""The calibration service: one pass over the batches collects only the named statistics, streaming.

`Collector` listens at every module that owns a site's tensor. Sites that are fed by the same tensor (q, k and v) share
one state; a tensor that several modules own (tied weights) has a state of its own, to which every owner's rows add.
Rows: R calibration rows, C input columns of a site's matrix in the order of its canonical view [O, ..., I].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rarefy.core.errors import BadInput
from rarefy.core.records import Site
from rarefy.core.roles import ModelStatistic, Statistic
from rarefy.core.rows import expert_hidden, family, obstacle, reading, rows

Stats = dict[str, dict[str, Tensor]]  # {statistic: {site name: Tensor}}


def collectable(module: nn.Module) -> bool:
    """Whether input statistics of the module's matrix exist; where not, only the weight alone (or its gradient) can be rated.

    False for embeddings, grouped convolutions and the output projection of nn.MultiheadAttention, see `rarefy.core.rows.obstacle`.

    >>> collectable(nn.Linear(2, 2)), collectable(nn.Embedding(2, 2))
    (True, False)
    """
    return not obstacle(module)


def owners(model: nn.Module, site: Site) -> list[str]:
    """The paths of the modules that hold a site's tensor under its parameter name, the site's own module included.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> model[1].weight = model[0].weight
    >>> owners(model, Site("0.weight", "0", "weight", (2, 2)))
    ['0', '1']
    """
    return _owners(model, site, _holders(model))


def _owners(model: nn.Module, site: Site, holders: Mapping[tuple[int, str], Sequence[str]]) -> list[str]:
    tensor = getattr(model.get_submodule(site.module), site.param)
    return list(dict.fromkeys((site.module, *holders.get((id(tensor), site.param), ()))))


def _holders(model: nn.Module) -> dict[tuple[int, str], list[str]]:
    """{(id of a tensor, parameter name): paths of the modules that hold it under that name}."""
    found: dict[tuple[int, str], list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for param, tensor in module._parameters.items():
            found[id(tensor), param].append(path)
    return found


@dataclass(frozen=True)
class _Seen:
    """The last input: the tensor, at which version, read how, and the site that it was recorded for."""

    x: Tensor
    version: int
    reading: Hashable
    site: str

    def same(self, x: Tensor, reading: Hashable) -> bool:
        return x is self.x and _version(x) == self.version and reading == self.reading


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class Collector(AbstractContextManager["Collector"]):
    """Collect input statistics of `sites` while it is entered; `valid` [B, T] marks the tokens that are not padding.

    A tied tensor collects ``H = sum_o H_o`` over its owners; an embedding among them (a tied head) has no rows to add.

    Raises:
        BadInput: NaN or inf reaches a site (named, with the batch), or a site without input statistics (`collectable`).
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], statistics: Sequence[Statistic]) -> None:
        self.model, self.sites, self.statistics = model, list(sites), statistics
        self.states: dict[str, dict[str, dict[str, Tensor]]] = {}
        self.leaders: dict[str, str] = {}
        self.rows: dict[str, int] = defaultdict(int)
        self.valid: Tensor | None = None
        self.batch = 0
        self._heard: dict[str, list[Site]] = defaultdict(list)
        self._tied: set[str] = set()
        self._last: _Seen | None = None
        self._hooks: list[RemovableHandle] = []
        holders = _holders(model) if statistics else {}
        for site in self.sites if statistics else ():
            self._place(site, holders)

    def _place(self, site: Site, holders: Mapping[tuple[int, str], Sequence[str]]) -> None:
        module = self.model.get_submodule(site.module)
        if obstacle(module):
            raise BadInput(f"site {site.name}", obstacle(module), "use a criterion of the weight alone, or exclude it")
        holding = {path: self.model.get_submodule(path) for path in _owners(self.model, site, holders)}
        readers = {path: holder for path, holder in holding.items() if not isinstance(holder, nn.Embedding)}
        if len(readers) > 1:
            self._tied.add(site.name)
        for path, reader in readers.items():
            if family(reader) != family(module) or obstacle(reader):
                raise BadInput(f"site {site.name}, tied to {path}", "tied weights must be read along one axis to share input statistics", "exclude it")
            self._heard[path].append(site)

    def __enter__(self) -> Collector:
        for path, sites in self._heard.items():
            module = self.model.get_submodule(path)
            self._hooks.append(module.register_forward_pre_hook(self._listen(module, sites), with_kwargs=True))
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _listen(self, module: nn.Module, sites: list[Site]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = [*args, *kwargs.values()]
            with torch.no_grad():
                if sites[0].expert is not None:
                    self._experts(module, sites, inputs)
                else:
                    self._see(sites[0], module, inputs[0])

        return hook

    def _weight(self, site: Site) -> Tensor:
        return site.read(getattr(self.model.get_submodule(site.module), site.param))

    def _see(self, site: Site, module: nn.Module, x: Tensor) -> None:
        """A site's module is called with x: share the state of the site that has just seen it, or record its rows."""
        name, last, how = site.name, self._last, reading(module)
        if name in self._tied:
            self._record(site, rows(module, x, self.valid))
            return
        if last is not None and last.same(x, how) and self.leaders.get(name, last.site) == last.site:
            self.leaders[name], self.rows[name] = last.site, self.rows[last.site]
            return
        leader = self.leaders.setdefault(name, name)
        if leader != name:
            raise BadInput(
                f"site {name}",
                f"it shared its input with {leader} in the first batch and does not in batch {self.batch}",
                "calibrate with batches that take one path through the model",
            )
        self._last = _Seen(x, _version(x), how, name)
        self._record(site, rows(module, x, self.valid))

    def _record(self, site: Site, seen: Tensor) -> None:
        if not torch.isfinite(seen).all():
            raise BadInput(
                f"site {site.name} sees {int((~torch.isfinite(seen)).sum())} NaN or inf values in calibration batch {self.batch}",
                "calibration activations must be finite",
                "check that batch, or load the model in float32",
            )
        self.rows[site.name] += seen.shape[0]
        states = self.states.get(site.name)
        if states is None:
            weight = self._weight(site)
            states = self.states[site.name] = {s.name: s.start(weight) for s in self.statistics}
        for statistic in self.statistics:
            states[statistic.name] = statistic.update(states[statistic.name], seen)

    def _experts(self, module: Any, sites: list[Site], inputs: list[Any]) -> None:
        """Each expert sees the rows routed to it; what its second matrix sees is computed here."""
        hidden, index = inputs[0].reshape(-1, inputs[0].shape[-1]), inputs[1].reshape(-1, inputs[1].shape[-1])
        if self.valid is not None and self.valid.numel() == hidden.shape[0]:
            hidden, index = hidden[self.valid.reshape(-1)], index[self.valid.reshape(-1)]
        for site in sites:
            routed = hidden[(index == site.expert).any(-1)]
            self._record(site, expert_hidden(module, site.expert, routed) if site.param == "down_proj" else routed)

    def finish(self) -> Stats:
        """{statistic: {site: Tensor}}. A site that saw no row (an idle expert) counts every input alike."""
        out: Stats = {s.name: {} for s in self.statistics}
        for site in self.sites if self.statistics else ():
            self._finish(site, out)
        return out

    def _finish(self, site: Site, out: Stats) -> None:
        leader = self.leaders.get(site.name, site.name)
        if self.rows[site.name] != self.rows[leader]:
            raise BadInput(
                f"site {site.name}",
                f"it shared its input with {leader}, which ran {self.rows[leader]} rows where it ran {self.rows[site.name]}",
                "calibrate with batches that take one path through the model",
            )
        for statistic in self.statistics:
            known = out[statistic.name].get(leader)
            if known is None:
                if self.rows[leader]:
                    known = statistic.finish(self.states[leader][statistic.name])
                else:
                    weight = self._weight(site)
                    eye = torch.eye(weight[0].numel(), device=weight.device)
                    known = statistic.finish(statistic.update(statistic.start(weight), eye))
            out[statistic.name][site.name] = known

    def idle(self) -> list[str]:
        """The sites that saw no row."""
        return [s.name for s in self.sites if self.statistics and not self.rows[s.name]]


def call(model: nn.Module, batch: Any) -> Any:
    """Run the model on a batch: a mapping as keywords, a tuple's or list's first element, or the tensor itself."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def valid_tokens(batch: Any) -> Tensor | None:
    """Bool [B, T], False at padding, or None where the batch has no attention mask."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return None if mask is None else mask.bool()


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss: next-token for a mapping with input_ids (labels added), or the `loss` of the output."""
    if not isinstance(batch, Mapping):
        raise BadInput(f"a batch of type {type(batch).__name__}", "gradients need a loss", "pass loss=function(model, batch)")
    labels = batch.get("labels", batch.get("input_ids"))
    if "labels" not in batch and batch.get("attention_mask") is not None and labels is not None:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return model(**{**batch, "labels": labels}).loss


def collect_all(
    model: nn.Module,
    batches: Iterable[Any],
    sites: Sequence[Site],
    statistics: Sequence[Statistic | ModelStatistic],
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Stats:
    """Every statistic of every site of the dense model.

    Args:
        model: evaluated as it is (call `.eval()` first); its weights are not changed.
        batches: see `call`.
        sites, statistics: what to collect.
        loss: (model, batch) -> scalar, for statistics of the gradient; default `default_loss`.

    Returns:
        {statistic name: {site name: Tensor}}.

    >>> from rarefy.weights.statistics.input import InputNorm
    >>> layer = nn.Linear(2, 1)
    >>> collect_all(layer, [torch.tensor([[3., 0.], [4., 1.]])], [Site("weight", "", "weight", (1, 2))], [InputNorm()])
    {'input_norm': {'weight': tensor([5., 1.])}}
    """
    batches = list(batches)
    streamed = [s for s in statistics if isinstance(s, Statistic)]
    from_input = [s for s in streamed if s.source == "input"]
    from_gradient = [s for s in streamed if s.source == "gradient"]
    if statistics and not batches:
        raise BadInput(
            f"no calibration batches for {', '.join(s.name for s in statistics)}", "this recipe measures activations or gradients", "pass batches, or --calibration TEXT"
        )
    out: Stats = {}
    if from_input:
        with Collector(model, sites, from_input) as collector, torch.no_grad():
            for i, batch in enumerate(batches):
                collector.valid, collector.batch = valid_tokens(batch), i
                call(model, batch)
                if progress:
                    progress(i + 1, len(batches), "calibration")
        out.update(collector.finish())
    if from_gradient:
        out.update(_gradients(model, batches, sites, from_gradient, loss or default_loss))
    for statistic in statistics:
        if isinstance(statistic, ModelStatistic):
            out[statistic.name] = statistic.collect(model, sites, batches, loss or default_loss)
    return out


@contextmanager
def differentiable(model: nn.Module, keys: Sequence[str]) -> Iterator[list[nn.Parameter]]:
    """The parameters of these keys with gradients on; the flags are as they were afterwards."""
    params = dict(model.named_parameters())
    before = {k: params[k].requires_grad for k in keys}
    try:
        for key in keys:
            params[key].requires_grad_(True)
        yield [params[k] for k in keys]
    finally:
        for key, flag in before.items():
            params[key].requires_grad_(flag)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """What runs inside leaves the model's buffers (a batch norm's averages) and the caller's random state as they were."""
    held = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(held[name])


def _gradients(model: nn.Module, batches: Sequence[Any], sites: Sequence[Site], statistics: Sequence[Statistic], loss: Callable[[nn.Module, Any], Tensor]) -> Stats:
    params = dict(model.named_parameters())
    states = {s.name: {t.name: t.start(s.read(params[s.key])) for t in statistics} for s in sites}
    keys = sorted({s.key for s in sites})
    with differentiable(model, keys) as tensors:
        for i, batch in enumerate(batches):
            with torch.enable_grad():
                grads = dict(zip(keys, torch.autograd.grad(loss(model, batch), tensors, allow_unused=True), strict=True))
            for site in sites:
                grad = grads[site.key]
                value = site.read(torch.zeros_like(params[site.key]) if grad is None else grad)
                if not torch.isfinite(value).all():
                    raise BadInput(f"the gradient of {site.name} in calibration batch {i}", "gradients must be finite", "check that batch, or load the model in float32")
                for statistic in statistics:
                    states[site.name][statistic.name] = statistic.update(states[site.name][statistic.name], value)
    return {t.name: {s.name: t.finish(states[s.name][t.name]) for s in sites} for t in statistics}
