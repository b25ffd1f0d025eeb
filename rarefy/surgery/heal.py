"""Heal: train a pruned model back, and lose no zero."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from rarefy.core.attach import attach_view, detach, viewed
from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Site
from rarefy.core.roles import View, asks
from rarefy.surgery.adapters import Adaptation
from rarefy.surgery.adapters.transposed import Transposed
from rarefy.surgery.distil import Teacher, next_token_loss
from rarefy.surgery.gradients import mean_gradients
from rarefy.weights.checkpoint import Checkpoint, digest
from rarefy.weights.sites import find_sites

Watch = Callable[[int, int, str], None]
PRUNED = 0.01  # the share of zeros from which a matrix counts as pruned: a dense one may hold a few by accident
_STATE = "state"


@dataclass(frozen=True)
class Training:
    """How long a step is and how large.

    lr None takes the method's own; it rises linearly over the `warmup` share of the steps, then falls by a cosine to zero.
    `batch` windows make a step, one at a time; `gradient_windows` are what a method that asks for the gradient sees.
    `recompute` trades time for memory: each block's activations are made again in backward.
    """

    lr: float | None = None
    batch: int = 1
    warmup: float = 0.1
    decay: float = 0.0
    clip: float = 1.0
    gradient_windows: int = 8
    recompute: bool = False
    save_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.save_every < 1 or (self.lr is not None and not self.lr > 0.0):
            raise BadInput(f"lr {self.lr}, batch {self.batch}, save_every {self.save_every}", "a learning rate is positive, and counts are at least 1")


def heal(
    model: nn.Module,
    windows: Sequence[Tensor],
    method: Adaptation,
    *,
    teacher: Teacher | None = None,
    training: Training | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Watch | None = None,
) -> dict[str, Any]:
    """Train what `method` attaches to the pruned matrices of a causal language model, and fold it in, in place.

    The matrices are frozen: neither momentum nor decay can reach a weight, and where they are zero they stay zero. A
    matrix counts as pruned from 1% zeros; every other parameter is left as it is. If training fails, the model is as before.

    Args:
        model: a transformers causal language model with plain weights.
        windows: token ids, int64 [1, T] each; each is trained on once, in an order drawn by the seed.
        method: what learns, see `rarefy.surgery.adapters`.
        teacher: a model to learn from besides the text, usually the dense parent.
        checkpoint: kept every `save_every` steps; a run that was stopped goes on from it to the same bytes.
        progress: called with (step, steps, label) after each step.

    Returns:
        {method, steps, tokens, trained_parameters, matrices, train_loss: [per step], zeros: {before, after, lost}}.

    Raises:
        Refused: no pruned matrix, quantised or packed weights, weights under a view, or a checkpoint of another run.
        BadInput: no windows, or a loss or gradient that is not finite; the step is named and the last good checkpoint kept.
    """
    how = training or Training()
    if not windows:
        raise BadInput("no windows", "healing needs text to train on")
    sites = pruned_sites(model)
    if checkpoint is not None:
        checkpoint.open(run_key(model, windows, method, teacher, how))
    before = zeros(model, sites)
    with frozen(model, teacher, how.recompute), torch.random.fork_rng():
        try:
            attach(model, sites, method, windows, how)
            losses, trained = _train(model, windows, method, teacher, how, checkpoint, progress)
        except BaseException:
            detach(model)
            raise
        fold(model)
    return report(method, windows, len(losses), trained, losses, before, zeros(model, sites))


def report(method: Adaptation, windows: Sequence[Tensor], steps: int, trained: int, losses: Sequence[float], before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Any]:
    """What every training back says of itself, see `heal`; `before` and `after` are the zeros of the sites."""
    return {
        "method": method.name,
        "steps": steps,
        "tokens": sum(w.numel() for w in windows),
        "trained_parameters": trained,
        "matrices": len(before),
        "train_loss": list(losses),
        "zeros": {"before": sum(before.values()), "after": sum(after.values()), "lost": sum(max(0, before[k] - after[k]) for k in before)},
    }


def pruned_sites(model: nn.Module) -> list[Site]:
    """The matrices that healing trains: of a Linear or a Conv1D, owned by one module, at least 1% zeros.

    Raises:
        Refused: there is none, the weights are quantised or packed, or a view is on them.
    """
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise Refused(
            "a packed or quantised model", "healing trains plain weights", "dequantize it first: rarefy unpack DIR --out PLAIN, or model.dequantize() and save_pretrained"
        )
    if viewed(model):
        raise Refused("a model with views on its weights", "healing puts its own there", "export it first, with rarefy.core.attach.exported")
    holders: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            holders[id(p)] = holders.get(id(p), 0) + 1
    found = []
    for site in find_sites(model):
        tensor = model.get_parameter(site.key)
        if site.role == "linear" and tensor.dim() == 2 and holders[id(tensor)] == 1 and _zeros(tensor) >= max(1.0, PRUNED * tensor.numel()):
            found.append(site)
    if not found:
        raise Refused("a model without zeros", f"healing trains matrices with at least {PRUNED:.0%} zeros, and there is none", "prune it first, with rarefy prune")
    return found


def zeros(model: nn.Module, sites: Sequence[Site]) -> dict[str, int]:
    """{site key: exact zeros}."""
    return {site.key: _zeros(model.get_parameter(site.key)) for site in sites}


def _zeros(tensor: Tensor) -> int:
    return tensor.numel() - int(torch.count_nonzero(tensor))


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Write what every view shows into its weight, and take the views off; the set of zeros is the same before and after.

    A kept weight that was trained to exactly zero becomes the smallest normal number of its dtype, with its old sign:
    otherwise it would silently join the pattern of whoever reads the pattern off the zeros.
    """
    for weight, view in viewed(model).values():
        value = view.export(weight).weight
        vanished = (value == 0) & (weight != 0)
        weight.copy_(torch.where(vanished, torch.finfo(weight.dtype).tiny * weight.sign(), value))
    detach(model)


@contextmanager
def frozen(model: Any, teacher: Teacher | None, recompute: bool) -> Iterator[None]:
    """Nothing of the model learns, it is in training mode, the teacher in evaluation mode; all as before afterwards."""
    flags = {p: p.requires_grad for p in model.parameters()}
    mode, teaching = model.training, teacher is not None and teacher.model.training
    for p in flags:
        p.requires_grad_(False)
    model.train()
    if teacher is not None:
        teacher.model.eval()
    if recompute:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)({"use_reentrant": False})
    try:
        yield
    finally:
        if recompute:
            (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
        model.train(mode)
        if teacher is not None:
            teacher.model.train(teaching)
        for p, flag in flags.items():
            p.requires_grad_(flag)


def attach(model: nn.Module, sites: Sequence[Site], method: Adaptation, windows: Sequence[Tensor], how: Training) -> None:
    stats: dict[str, dict[str, Tensor]] = {}
    if "gradient" in asks(method.view):
        tensors = {s.key: model.get_parameter(s.key) for s in sites}
        torch.manual_seed(how.seed)
        stats["gradient"] = mean_gradients(tensors, [_on(model, w) for w in windows[: how.gradient_windows]], lambda ids: next_token_loss(model, ids))
    generator = torch.Generator().manual_seed(how.seed)
    for site in sites:
        weight = model.get_parameter(site.key)
        view: View = method.view(site.read(weight.detach()), generator=generator, **{name: site.read(known.pop(site.key)) for name, known in stats.items()})
        attach_view(model, site.key, view if site.axes == (0, 1) else Transposed(view))
    model.train()


def _on(model: nn.Module, ids: Tensor) -> Tensor:
    return ids.to(next(model.parameters()).device)


def _train(
    model: nn.Module, windows: Sequence[Tensor], method: Adaptation, teacher: Teacher | None, how: Training, checkpoint: Checkpoint | None, progress: Watch | None
) -> tuple[list[float], int]:
    learned = {f"{key}|{name}": p for key, (_, view) in viewed(model).items() for name, p in view.named_parameters()}
    lr = method.lr if how.lr is None else how.lr
    optimizer = AdamW(learned.values(), lr=lr, weight_decay=how.decay)
    steps = math.ceil(len(windows) / how.batch)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(how.seed)).tolist()
    losses = _resume(checkpoint, learned, optimizer, steps)
    saved = len(losses)
    for step in range(len(losses), steps):
        torch.manual_seed(how.seed * 1_000_003 + step)  # a step's dropout depends on the step alone: a resumed run draws the same
        chosen = [windows[i] for i in order[step * how.batch : (step + 1) * how.batch]]
        each = (next_token_loss(model, _on(model, ids), teacher) for ids in chosen)
        losses.append(descend(each, len(chosen), optimizer, lr * rate(step, steps, how.warmup), how.clip, "loss", Place(step + 1, saved, checkpoint)))
        if checkpoint is not None and ((step + 1) % how.save_every == 0 or step + 1 == steps):
            _save(checkpoint, learned, optimizer, losses)
            saved = step + 1
            checkpoint.finished = (saved, steps)
        if progress is not None:
            progress(step + 1, steps, f"heal, loss {losses[-1]:.3f}")
    return losses, sum(p.numel() for p in learned.values())


def rate(step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate at a step: linear up, then a cosine down.

    >>> [round(rate(t, 10, 0.2), 2) for t in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@dataclass(frozen=True)
class Place:
    """Where training is when something is not finite."""

    step: int
    saved: int
    checkpoint: Checkpoint | None

    def finite(self, value: Tensor, what: str) -> None:
        if bool(torch.isfinite(value)):
            return
        kept = f"; the checkpoint of step {self.saved} is kept in {self.checkpoint.folder}" if self.checkpoint is not None and self.saved else ""
        raise BadInput(
            f"the {what} at step {self.step} is {float(value.detach())}", f"training must stay finite{kept}", "lower the learning rate (--lr), or load the model in float32"
        )


def descend(losses: Iterable[Tensor], count: int, optimizer: Optimizer, lr: float, clip: float, what: str, place: Place) -> float:
    """One optimizer step over `count` losses, each made as it is asked for; their mean. Nothing is changed where `what` they are or the gradient is not finite."""
    total = 0.0
    optimizer.zero_grad()
    for loss in losses:
        place.finite(loss, what)
        (loss / count).backward()
        total += float(loss.detach()) / count
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    place.finite(nn.utils.clip_grad_norm_(trained, clip), "gradient")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return total


def run_key(model: nn.Module, windows: Sequence[Tensor], method: Adaptation, teacher: Teacher | None, how: Training) -> str:
    taught = None if teacher is None else (teacher.alpha, teacher.temperature, dict(teacher.model.state_dict()))
    options = {k: v for k, v in asdict(how).items() if k not in ("save_every", "recompute")}
    return digest(method, options, taught, list(windows), dict(model.state_dict()), torch.get_num_threads(), torch.__version__)


def _save(checkpoint: Checkpoint, learned: dict[str, nn.Parameter], optimizer: Optimizer, losses: list[float]) -> None:
    tensors = {f"value|{name}": p.detach() for name, p in learned.items()}
    for name, p in learned.items():
        tensors |= {f"{kind}|{name}": state for kind, state in optimizer.state[p].items()}
    checkpoint.put(_STATE, {name: t.cpu().contiguous() for name, t in tensors.items()}, [{"losses": losses}])


@torch.no_grad()
def _resume(checkpoint: Checkpoint | None, learned: dict[str, nn.Parameter], optimizer: AdamW, steps: int) -> list[float]:
    found = None if checkpoint is None else checkpoint.get(_STATE)
    if found is None:
        return []
    tensors, [record] = found
    for name, p in learned.items():
        p.copy_(tensors[f"value|{name}"])
        optimizer.state[p] = {kind: tensors[f"{kind}|{name}"].to(p.device if kind != "step" else "cpu") for kind in ("step", "exp_avg", "exp_avg_sq")}
    losses: list[float] = json.loads(json.dumps(record["losses"]))
    assert checkpoint is not None
    checkpoint.finished = (len(losses), steps)
    if checkpoint.on_resume is not None:
        checkpoint.on_resume(len(losses), steps)
    return losses
