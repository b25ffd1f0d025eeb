"""The calibration service: one pass over the batches collects only the named statistics, streaming.

`Collector` listens at the sites' modules. Sites that are fed by the same tensor (q, k and v) share one state.
Rows: R calibration rows, C input columns of a site's matrix in the order of its canonical view [O, ..., I].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rarefy.core.errors import BadInput
from rarefy.core.records import Site
from rarefy.core.roles import Statistic

Stats = dict[str, dict[str, Tensor]]  # {statistic: {site name: Tensor}}


class Collector(AbstractContextManager["Collector"]):
    """Collect input statistics of `sites` while it is entered; `valid` [B, T] marks the tokens that are not padding.

    Raises:
        BadInput: NaN or inf reaches a site (named, with the batch), or a site has no input features.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], statistics: Sequence[Statistic]) -> None:
        self.model, self.statistics = model, statistics
        self.sites: dict[str, list[Site]] = defaultdict(list)
        for site in sites:
            if site.role == "embedding" and statistics:
                raise BadInput(f"site {site.name}", "an embedding has no input features, so no input statistic", "use a criterion of the weight alone, or exclude it")
            self.sites[site.module].append(site)
        self.states: dict[str, dict[str, dict[str, Tensor]]] = {}
        self.leaders: dict[str, str] = {}
        self.rows: dict[str, int] = defaultdict(int)
        self.valid: Tensor | None = None
        self.batch = 0
        self._last: tuple[Tensor | None, str] = (None, "")
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Collector:
        if self.statistics:
            for path, sites in self.sites.items():
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
                    self._see(sites[0], getattr(module, sites[0].param), inputs[0], lambda x: _rows(module, self._unpadded(x)))

        return hook

    def _unpadded(self, x: Tensor) -> Tensor:
        if self.valid is not None and x.shape[:2] == self.valid.shape and x.dim() == 3:
            return x[self.valid]
        if self.valid is not None and x.dim() == 2 and x.shape[0] == self.valid.numel():
            return x[self.valid.reshape(-1)]  # a host that flattens batch and sequence
        return x

    def _see(self, site: Site, tensor: Tensor, x: Tensor, rows: Callable[[Tensor], Tensor]) -> None:
        name = site.name
        if x is self._last[0] and self.leaders.get(name, self._last[1]) == self._last[1]:
            self.leaders[name] = self._last[1]
            self.rows[name] = self.rows[self._last[1]]
            return
        leader = self.leaders.setdefault(name, name)
        if leader != name:
            raise BadInput(
                f"site {name}",
                f"it shared its input with {leader} in the first batch and does not in batch {self.batch}",
                "calibrate with batches that take one path through the model",
            )
        self._last = (x, name)
        seen = rows(x)
        if not torch.isfinite(seen).all():
            raise BadInput(
                f"site {name} sees {int((~torch.isfinite(seen)).sum())} NaN or inf values in calibration batch {self.batch}",
                "calibration activations must be finite",
                "check that batch, or load the model in float32",
            )
        self.rows[name] += seen.shape[0]
        weight = site.read(tensor)
        states = self.states.setdefault(name, {s.name: s.start(weight) for s in self.statistics})
        for statistic in self.statistics:
            states[statistic.name] = statistic.update(states[statistic.name], seen)

    def _experts(self, module: Any, sites: list[Site], inputs: list[Any]) -> None:
        """Each expert sees the rows routed to it; what its second matrix sees is computed here."""
        hidden, index = inputs[0].reshape(-1, inputs[0].shape[-1]), inputs[1].reshape(-1, inputs[1].shape[-1])
        if self.valid is not None and self.valid.numel() == hidden.shape[0]:
            hidden, index = hidden[self.valid.reshape(-1)], index[self.valid.reshape(-1)]
        for site in sites:
            rows = hidden[(index == site.expert).any(-1)]
            self._last = (None, "")
            second = site.param == "down_proj"
            seen = _expert_hidden(module, site.expert, rows) if second else rows
            self._see(site, getattr(module, site.param), seen, lambda x: x)

    def finish(self) -> Stats:
        """{statistic: {site: Tensor}}. A site that saw no row (an idle expert) counts every input alike."""
        out: Stats = {s.name: {} for s in self.statistics}
        for sites in self.sites.values():
            for site in sites:
                self._finish(site, out)
        return out

    def _finish(self, site: Site, out: Stats) -> None:
        leader = self.leaders.get(site.name, site.name)
        for statistic in self.statistics:
            known = out[statistic.name].get(leader)
            if known is None:
                states = self.states.get(leader)
                if states is None or not self.rows[leader]:
                    weight = site.read(getattr(self.model.get_submodule(site.module), site.param))
                    eye = torch.eye(weight[0].numel(), device=weight.device)
                    known = statistic.finish(statistic.update(statistic.start(weight), eye))
                else:
                    known = statistic.finish(states[statistic.name])
            out[statistic.name][site.name] = known

    def idle(self) -> list[str]:
        """The sites that saw no row."""
        return [s.name for sites in self.sites.values() for s in sites if self.statistics and not self.rows[self.leaders.get(s.name, s.name)]]


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """The rows [R, C] that multiply a module's matrix, C in the order of the canonical view."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return _conv_rows(module, x)
    if isinstance(module, nn.Conv3d):
        raise BadInput(f"a {type(module).__name__}", "input statistics of 3-D convolutions are not collected", "use a criterion of the weight alone")
    return x.reshape(-1, x.shape[-1])


def _conv_rows(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise BadInput(
            f"a convolution with groups={module.groups}, padding={module.padding!r}, mode {module.padding_mode}",
            "input statistics need groups=1 and numeric zero padding",
            "exclude it, or use a criterion of the weight alone",
        )
    kernel, dilation, padding, stride = module.kernel_size, module.dilation, module.padding, module.stride
    if isinstance(module, nn.Conv1d):
        x, kernel, dilation, padding, stride = x[:, :, None], (1, *kernel), (1, *dilation), (0, *padding), (1, *stride)
    patches = F.unfold(x, kernel, dilation, padding, stride)  # [B, I * K, L], input channel outermost
    batch, columns, places = patches.shape
    return patches.view(batch, x.shape[1], columns // x.shape[1], places).permute(0, 3, 2, 1).reshape(-1, columns)


def _expert_hidden(module: Any, expert: int | None, rows: Tensor) -> Tensor:
    def linear(x: Tensor, param: str) -> Tensor:
        weight = getattr(module, param)[expert]
        y = x @ weight if getattr(module, "is_transposed", False) else F.linear(x, weight)
        bias = getattr(module, f"{param}_bias", None)
        return y if bias is None else y + bias[expert]

    if hasattr(module, "gate_up_proj"):
        return module._apply_gate(linear(rows, "gate_up_proj"))
    return module.act_fn(linear(rows, "up_proj"))


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
    statistics: Sequence[Statistic],
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
    from_input = [s for s in statistics if s.source == "input"]
    from_gradient = [s for s in statistics if s.source == "gradient"]
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
    return out


def _gradients(model: nn.Module, batches: Sequence[Any], sites: Sequence[Site], statistics: Sequence[Statistic], loss: Callable[[nn.Module, Any], Tensor]) -> Stats:
    params = dict(model.named_parameters())
    states = {s.name: {t.name: t.start(s.read(params[s.key])) for t in statistics} for s in sites}
    keys = sorted({s.key for s in sites})
    before = {k: params[k].requires_grad for k in keys}
    try:
        for key in keys:
            params[key].requires_grad_(True)
        for i, batch in enumerate(batches):
            with torch.enable_grad():
                grads = dict(zip(keys, torch.autograd.grad(loss(model, batch), [params[k] for k in keys], allow_unused=True), strict=True))
            for site in sites:
                grad = grads[site.key]
                value = site.read(torch.zeros_like(params[site.key]) if grad is None else grad)
                if not torch.isfinite(value).all():
                    raise BadInput(f"the gradient of {site.name} in calibration batch {i}", "gradients must be finite", "check that batch, or load the model in float32")
                for statistic in statistics:
                    states[site.name][statistic.name] = statistic.update(states[site.name][statistic.name], value)
    finally:
        for key, flag in before.items():
            params[key].requires_grad_(flag)
    return {t.name: {s.name: t.finish(states[s.name][t.name]) for s in sites} for t in statistics}
