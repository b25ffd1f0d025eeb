"""`train`: a task, a recipe and a density to a sparse model and a record; survives a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.core.attach import exported
from rarefy.core.control import Control
from rarefy.core.errors import BadFile, BadInput, Refused
from rarefy.core.files import write_atomic
from rarefy.core.records import Phase, TrainRecipe
from rarefy.core.roles import Allocation, Task
from rarefy.weights.source_net import SourceNet
from rarefy.weights.sparsifier import Sparsifier
from rarefy.weights.triggers.arrival import Arrival

Factory = Callable[[Iterable[nn.Parameter]], Optimizer]
_CHECKPOINT, _MODEL, _RECORD = "checkpoint.safetensors", "model.safetensors", "record.json"


def train(
    task: Task,
    recipe: TrainRecipe,
    *,
    density: float,
    steps: int,
    seed: int = 0,
    optimizer: Factory | None = None,
    options: dict[str, Any] | None = None,
    allocation: Allocation | None = None,
    within: SourceNet | None = None,
    checkpoint_dir: str | Path | None = None,
    save_every: int = 100,
    resume: bool = True,
    calibration: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train sparsely from scratch; the same seed gives the same bytes, and the caller's random state is left as it was.

    Args:
        density: fraction of the sites' weights kept at the end, in (0, 1].
        steps: optimizer steps.
        optimizer: parameters -> optimizer (default the task's, which is SGD 0.1, momentum 0.9, weight decay 1e-4 unless it says otherwise).
        options: for `task.model`.
        allocation: in place of the recipe's, in every phase; a phase that states none of its own has the recipe's.
        within: a random source network, drawn first, that training never leaves.
        checkpoint_dir: where a checkpoint is kept every `save_every` steps and, at the end, model.safetensors (dense with
            zeros) and record.json are written; each file appears whole or not at all.
        resume: continue a checkpoint of the same run, to the same bytes as without the stop.
        calibration: on how many of the run's first batches a criterion of the gradient is measured; where data arrives, on what is new of it.
        progress: called with (step, steps) after each step.

    Returns:
        {task, recipe, allocation, density_requested, density (measured), metric, steps, seed, sites: [{key, shape, nnz}]}, and
        `options` where some were given, `states` where data arrived: the metric before every arrival, and at the end.

    Raises:
        BadInput: density or steps out of range, or a recipe that waits for data that does not come.  BadFile: a damaged checkpoint.  Refused: a checkpoint of another run.
    """
    if not 0.0 < density <= 1.0 or steps < 1:
        raise BadInput(f"density {density}, steps {steps}", "a density lies in (0, 1] and training has at least one step", "pass for example density=0.1, steps=1000")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.model(seed, **(options or {}))
        phases = tuple(replace(phase, allocation=allocation or phase.allocation or recipe.allocation) for phase in recipe.phases(density, steps))
        phases = (*(() if within is None else within.before(density)), *phases)
        arrivals = _arrivals(task, recipe, phases, steps)
        batches = task.arrived(seed, 0) or [task.batch(seed, step) for step in range(calibration)]
        sparsifier = Sparsifier(model, phases, sites=task.sites(model), total=steps, seed=seed, batches=batches, batch_loss=task.loss)
        opt = (optimizer or task.optimizer)(model.parameters())
        sparsifier.attach(opt)
        control = Control(model, opt, task.controllers(model))
        run = {
            "task": repr(task),
            "recipe": recipe.name,
            "density": density,
            "steps": steps,
            "seed": seed,
            "options": options or {},
            "calibration": calibration,
            "allocation": repr(allocation or recipe.allocation),
            **({} if within is None else {"within": repr(within)}),
        }
        folder = None if checkpoint_dir is None else Path(checkpoint_dir)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if resume and (folder / _CHECKPOINT).exists():
                _load(folder / _CHECKPOINT, run, model, sparsifier, opt, control)
                seen = [step for step in arrivals if step < sparsifier.progress.step]
                sparsifier.batches = task.arrived(seed, seen[-1]) if seen else sparsifier.batches
        for step in range(sparsifier.progress.step, steps):
            if step in arrivals:
                _arrive(task, seed, step, model, sparsifier)
            opt.zero_grad()
            control.loss(sparsifier.loss(task.loss(model, task.batch(seed, step)))).backward()
            opt.step()
            if folder is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
                _save(folder / _CHECKPOINT, run, model, sparsifier, opt, control)
            if progress is not None:
                progress(step + 1, steps)
        control.close()
        with exported(model):
            record = _record(task, run, model, sparsifier)
            if folder is not None:
                _write(folder, model, record)
    return record


def _arrivals(task: Task, recipe: TrainRecipe, phases: Sequence[Phase], steps: int) -> tuple[int, ...]:
    """Before which steps data arrives. BadInput: the recipe waits for more of it than comes."""
    arrivals = task.arrivals(steps)
    waits = sum(phase.until.count for phase in phases[:-1] if isinstance(phase.until, Arrival) and phase.until.kind == "data")
    if waits > len(arrivals):
        raise BadInput(
            f"recipe {recipe.name} on task {task.name}",
            f"it waits {waits} times for new data, which arrives {len(arrivals)} times in {steps} steps",
            "name a task whose data arrives, or ask for more steps",
        )
    return arrivals


def _arrive(task: Task, seed: int, step: int, model: nn.Module, sparsifier: Sparsifier) -> None:
    """What the model can do before it sees the new data is noted; criteria are measured on the new data from now on."""
    with exported(model):
        metric = task.evaluate(model)
    sparsifier.batches = task.arrived(seed, step)
    sparsifier.boundary("data", **metric)


def _write(folder: Path, model: nn.Module, record: dict[str, Any]) -> None:
    tensors = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    write_atomic(folder / _MODEL, save(tensors))
    write_atomic(folder / _RECORD, (json.dumps(record, indent=2) + "\n").encode())


def _record(task: Task, run: dict[str, Any], model: nn.Module, sparsifier: Sparsifier) -> dict[str, Any]:
    sites = [{"key": key, "shape": list(w.shape), "nnz": int((w != 0).sum())} for key, w in sparsifier.weights.items()]
    measured = sum(int((w != 0).sum()) for w in sparsifier.weights.values()) / sum(w.numel() for w in sparsifier.weights.values())
    head = {"task": task.name, "recipe": run["recipe"], "allocation": run["allocation"], "density_requested": run["density"], "density": measured}
    head |= {"options": run["options"]} if run["options"] else {}
    head |= {"within": run["within"]} if "within" in run else {}
    metric = task.evaluate(model)
    states = [dict(event.data) for event in sparsifier.ledger if event.kind == "data"]
    head |= {"states": [*states, metric]} if states else {}
    return {**head, "metric": metric, "steps": run["steps"], "seed": run["seed"], "sites": sites}


def _save(path: Path, run: dict[str, Any], model: nn.Module, sparsifier: Sparsifier, optimizer: Optimizer, control: Control) -> None:
    """Tensors as tensors, everything else as JSON in the same file's metadata: one file, one moment."""
    state, moments = sparsifier.state_dict(), optimizer.state_dict()
    tensors: dict[str, Tensor] = {f"model/{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"mask/{k}": v for k, v in state.pop("masks").items()}
    tensors |= {f"outer/{k}": v for k, v in state.pop("outer").items()}
    tensors |= {f"anchor/{name}/{k}": v for name, anchor in state.pop("anchors").items() for k, v in anchor.items()}
    tensors["generator"] = state.pop("generator")
    tensors["torch_generator"] = torch.get_rng_state()
    plain: dict[str, dict[str, Any]] = {}
    for index, values in moments["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    scalars = {"run": run, "sparsifier": state, "groups": moments["param_groups"], "plain": plain, "control": control.state_dict()}
    copies = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    write_atomic(path, save(copies, metadata={"rarefy": json.dumps(scalars)}))


def _load(path: Path, run: dict[str, Any], model: nn.Module, sparsifier: Sparsifier, optimizer: Optimizer, control: Control) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            scalars = json.loads((file.metadata() or {})["rarefy"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:
        raise BadFile(f"checkpoint {path}", f"it must be a checkpoint that train wrote, and reading raised {type(error).__name__}", "delete it or pass resume=False") from error
    if scalars["run"] != json.loads(json.dumps(run)):
        raise Refused(f"checkpoint {path} of {scalars['run']}", f"this run is {run}", "name another checkpoint_dir or pass resume=False")
    of = {p: {k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("model/", "mask/", "outer/", "anchor/", "optimizer/")}
    model.load_state_dict(of["model/"])
    anchors: dict[str, dict[str, Tensor]] = {}
    for key, value in of["anchor/"].items():
        anchor, name = key.split("/", 1)
        anchors.setdefault(anchor, {})[name] = value
    sparsifier.load_state_dict({**scalars["sparsifier"], "masks": of["mask/"], "outer": of["outer/"], "anchors": anchors, "generator": tensors["generator"]})
    moments: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in scalars["plain"].items()}
    for key, value in of["optimizer/"].items():
        index, name = key.split("/", 1)
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": scalars["groups"]})
    control.load_state_dict(scalars["control"])
    torch.set_rng_state(tensors["torch_generator"])
