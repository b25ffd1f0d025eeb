"""Block by block: every block is trained to give what the dense parent's gives, on the inputs that the blocks before it now make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from rarefy.core.attach import detach, viewed
from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Site
from rarefy.surgery.adapters import Adaptation
from rarefy.surgery.courses import Course
from rarefy.surgery.distil import Teacher
from rarefy.surgery.heal import Place, Training, Watch, attach, descend, fold, frozen, pruned_sites, rate, report, run_key, zeros
from rarefy.weights.blocks import Calls, capture, find_chain, first, run_block
from rarefy.weights.checkpoint import Checkpoint

HELD_OUT = 8  # one window of so many is not trained on, to measure on


@dataclass(frozen=True)
class ByBlock(Course):
    """Minimise the squared error of every transformer block's output, one block after the other, masks fixed.

    ``min ||f_b(x'; W') - f_b(x; W)||^2 / ||f_b(x; W)||^2`` over the windows: W the dense parent's weights, x the inputs that it gives its
    block b, x' those that the trained blocks before b give, so that a block also makes up for what the others lost. Only one
    block's activations, gradients and moments are alive at a time. Of eight windows or more one in eight is held out: measured, not trained on.
    Where a few tokens hold most of the norm, as in the middle of many language models, these shares look small whatever the others lost.
    A block whose error on the training windows did not fall keeps what the method makes of it untrained.

    Args:
        epochs: how often each window is seen.

    `run` returns besides what `heal` does: blocks: [{name, before, after, held_out_before, held_out_after}], relative squared errors, `before`
    with the method attached and untrained (one-shot rounding, where the method rounds).

    Raises:
        BadInput: no teacher, fewer windows than one, or a loss or gradient that is not finite.
        Refused: a model that is no chain of blocks, or one with another chain than the teacher's.
    """

    epochs: int = 2
    name = "by-block"
    unit = "blocks"

    def run(
        self,
        model: nn.Module,
        windows: Sequence[Tensor],
        method: Adaptation,
        *,
        teacher: Teacher | None = None,
        training: Training | None = None,
        checkpoint: Checkpoint | None = None,
        progress: Watch | None = None,
    ) -> dict[str, Any]:
        how = training or Training()
        if teacher is None or not windows or self.epochs < 1:
            raise BadInput(
                "no dense parent" if teacher is None else f"{len(windows)} windows, {self.epochs} epochs", "blocks learn from the dense parent's on text", "name a teacher"
            )
        sites = pruned_sites(model)
        if checkpoint is not None:
            checkpoint.open(f"{run_key(model, windows, method, teacher, how)}|{self}")
        before, start = zeros(model, sites), {s.key: model.get_parameter(s.key).detach().clone() for s in sites}
        with frozen(model, teacher, recompute=False), torch.random.fork_rng():
            model.eval()
            try:
                blocks, trained = _Walk(self, model, teacher, sites, windows, method, how, checkpoint, progress).go()
            except BaseException:
                detach(model)
                with torch.no_grad():
                    for key, weight in start.items():
                        model.get_parameter(key).copy_(weight)
                raise
        steps = len(blocks) * self.epochs * math.ceil(len(_split(windows)[0]) / how.batch)
        return {**report(method, windows, steps, trained, [b["after"] for b in blocks], before, zeros(model, sites)), "blocks": blocks}


def _split(windows: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(trained on, held out)."""
    held = [w for i, w in enumerate(windows) if i % HELD_OUT == HELD_OUT - 1]
    return [w for i, w in enumerate(windows) if i % HELD_OUT != HELD_OUT - 1], held


@dataclass
class _Walk:
    """One run over the blocks: what it was given, and how it goes."""

    course: ByBlock
    model: nn.Module
    teacher: Teacher
    sites: list[Site]
    windows: Sequence[Tensor]
    method: Adaptation
    how: Training
    checkpoint: Checkpoint | None
    progress: Watch | None

    def go(self) -> tuple[list[dict[str, Any]], int]:
        """(a record of every block with pruned matrices, numbers that were trained)."""
        batches = [{"input_ids": w.to(next(self.model.parameters()).device)} for w in self.windows]
        chain, parent = find_chain(self.model, batches[0]), find_chain(self.teacher.model, batches[0])
        inside = {path: [s for s in self.sites if s.module.startswith(path + ".")] for path, _ in chain}
        if not chain or [p for p, _ in chain] != [p for p, _ in parent] or not any(inside.values()):
            raise Refused("a model that is no chain of blocks like its teacher's", "blocks are trained one after the other", "train it end to end")
        if self.checkpoint is not None:
            self.checkpoint.expect([path for path, found in inside.items() if found])
        mine, theirs = capture(self.model, chain, batches), capture(self.teacher.model, parent, batches)
        records, trained = [], 0
        for index, ((path, block), (_, dense)) in enumerate(zip(chain, parent, strict=True)):
            wanted = [run_block(dense, calls, index) for calls in theirs]
            if inside[path]:
                record, count = self._restored(path, inside[path]) or self._kept(path, inside[path], *self._fit(index, path, block, inside[path], mine, wanted))
                records.append(record)
                trained += count
            for calls, their, out in zip(mine, theirs, wanted, strict=True):
                calls.hidden, their.hidden = run_block(block, calls, index), out
            if self.progress is not None:
                self.progress(index + 1, len(chain), f"{path}, error {records[-1]['after']:.2g}" if records else path)
        return records, trained

    def _restored(self, path: str, sites: Sequence[Site]) -> tuple[dict[str, Any], int] | None:
        found = None if self.checkpoint is None else self.checkpoint.get(path)
        if found is None:
            return None
        tensors, [record] = found
        with torch.no_grad():
            for site in sites:
                self.model.get_parameter(site.key).copy_(tensors[site.key])
        return record["block"], record["trained"]

    def _kept(self, path: str, sites: Sequence[Site], record: dict[str, Any], trained: int) -> tuple[dict[str, Any], int]:
        if self.checkpoint is not None:
            tensors = {s.key: self.model.get_parameter(s.key).detach().cpu().contiguous() for s in sites}
            self.checkpoint.put(path, tensors, [{"block": record, "trained": trained}])
        return record, trained

    def _fit(self, index: int, path: str, block: nn.Module, sites: Sequence[Site], calls: Sequence[Calls], wanted: Sequence[Tensor]) -> tuple[dict[str, Any], int]:
        """Train one block and fold it in."""
        pairs, held = _split(list(zip(calls, wanted, strict=True)))
        attach(self.model, sites, self.method, self.windows, self.how)
        self.model.eval()
        learned = [p for _, view in viewed(self.model).values() for p in view.parameters()]
        untrained = [p.detach().clone() for p in learned]
        before, held_before = _error(block, index, pairs), _error(block, index, held) if held else None
        self._descend(index, path, block, learned, pairs)
        after = _error(block, index, pairs)
        if not after < before:
            with torch.no_grad():
                for p, old in zip(learned, untrained, strict=True):
                    p.copy_(old)
            after = before
        held_after = _error(block, index, held) if held else None
        fold(self.model)
        return {"name": path, "before": before, "after": after, "held_out_before": held_before, "held_out_after": held_after}, sum(p.numel() for p in learned)

    def _descend(self, index: int, path: str, block: nn.Module, learned: Sequence[nn.Parameter], pairs: Sequence[tuple[Calls, Tensor]]) -> None:
        lr, each = self.method.lr if self.how.lr is None else self.how.lr, math.ceil(len(pairs) / self.how.batch)
        optimizer = AdamW(learned, lr=lr, weight_decay=self.how.decay)
        for epoch in range(self.course.epochs):
            order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(self.how.seed * 1_000_003 + epoch)).tolist()
            for step in range(each):
                chosen = [pairs[i] for i in order[step * self.how.batch : (step + 1) * self.how.batch]]
                losses = (_loss(block, index, batch, target) for batch, target in chosen)
                pace = lr * rate(epoch * each + step, self.course.epochs * each, self.how.warmup)
                descend(losses, len(chosen), optimizer, pace, self.how.clip, f"error of {path}", Place(index + 1, index, self.checkpoint))


def _loss(block: nn.Module, index: int, calls: Calls, wanted: Tensor) -> Tensor:
    """``||out - wanted||^2 / ||wanted||^2`` over the window, with its gradient."""
    args, kwargs = calls.rest[index]
    out = first(block(calls.hidden, *args, **kwargs)).float()
    error: Tensor = (out - wanted.float()).square().sum() / wanted.float().square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return error


@torch.no_grad()
def _error(block: nn.Module, index: int, pairs: Sequence[tuple[Calls, Tensor]]) -> float:
    """The mean over some windows."""
    return float(torch.stack([_loss(block, index, calls, wanted) for calls, wanted in pairs]).mean())
