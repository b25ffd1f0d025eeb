"""A Sparsifier inside transformers' Trainer: one callback, checkpoints included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from rarefy.core.errors import BadFile, MissingExtra
from rarefy.weights.sparsifier import Sparsifier

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as absent:
    raise MissingExtra("transformers", "hub") from absent

_FILE = "sparsifier.safetensors"


class SparsifierCallback(TrainerCallback):
    """``Trainer(model, ..., callbacks=[SparsifierCallback(Sparsifier(model, phases, ...))])``

    Attaches to the Trainer's optimizer, saves the sparsifier into every checkpoint folder, restores it from there
    when training resumes, and reports epochs to triggers. Loss, dual and activation penalties need
    `sparsifier.loss` in `compute_loss`; a step without it is refused.

    Raises:
        BadFile: training resumes from a checkpoint that holds no sparsifier.
    """

    def __init__(self, sparsifier: Sparsifier) -> None:
        self.sparsifier = sparsifier

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        self.sparsifier.attach(getattr(optimizer, "optimizer", optimizer))
        if state.global_step:
            load_sparsifier(_folder(args, state) / _FILE, self.sparsifier)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            save_sparsifier(_folder(args, state) / _FILE, self.sparsifier)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sparsifier.boundary("epoch")


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def save_sparsifier(path: Path, sparsifier: Sparsifier) -> None:
    """Masks and generator as tensors, the rest as JSON in the file's metadata."""
    state = sparsifier.state_dict()
    tensors = {f"mask/{k}": v.contiguous() for k, v in state.pop("masks").items()} | {"generator": state.pop("generator")}
    save_file(tensors, path, metadata={"rarefy": json.dumps(state)})


def load_sparsifier(path: Path, sparsifier: Sparsifier) -> None:
    """Restore what `save_sparsifier` wrote. BadFile where the file is absent or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["rarefy"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:
        raise BadFile(f"{path}", f"it must be a sparsifier's checkpoint, and reading raised {type(error).__name__}", "resume from a checkpoint of a sparse run") from error
    masks = {k.removeprefix("mask/"): v for k, v in tensors.items() if k.startswith("mask/")}
    sparsifier.load_state_dict({**state, "masks": masks, "generator": tensors["generator"]})
