"""`rarefy heal`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from rarefy.cli import names
from rarefy.cli.arguments import Device, Force, Json, Seed, Text
from rarefy.cli.loading import check_out, load, need_plain
from rarefy.cli.main import app
from rarefy.cli.output import bars, err, line, show
from rarefy.cli.prune import need_tokenizer, versions
from rarefy.cli.resuming import finished, resumable
from rarefy.core.errors import BadFile, BadInput, Refused
from rarefy.hub.card import Card, Figure
from rarefy.hub.export import RECORD as PRUNED
from rarefy.hub.export import clear_drafts, save_dense
from rarefy.hub.load import Loaded
from rarefy.hub.text import WINDOW, calibration_batches, heldout_ids
from rarefy.probes.perplexity import perplexity
from rarefy.surgery.adapters import Adaptation
from rarefy.surgery.courses import Course
from rarefy.surgery.distil import Teacher
from rarefy.surgery.heal import Training, pruned_sites
from rarefy.weights.checkpoint import Checkpoint

RECORD = "heal.json"
RUN = 64  # so many tokens in a row in both texts mean that they overlap

EPILOG = (
    "Examples:  rarefy heal half --tokens 50k --out healed   ·   rarefy heal half --method lors:rank=8 --teacher demo --tokens 20k --out healed   ·   "
    "rarefy heal half --method full --lr 2e-5 --train-text mine.txt --out healed --json   ·   "
    "rarefy heal half --course by-block --method int4-weights --teacher demo --out rounded"
)


@app.command(epilog=EPILOG)
def heal(
    model: Annotated[str, typer.Argument(help="A pruned model: a folder, or a Hugging Face name.")],
    out: Annotated[str | None, typer.Option(help="The folder to write; default: the model's folder with -healed.")] = None,
    tokens: Annotated[str, typer.Option(help="Training tokens, each seen once: 50k, 2M, 8192.")] = "50k",
    method: Annotated[str, typer.Option(help="spp, lors, masked-lora, full, int4-weights or int4-scales, with options such as spp:rank=8.")] = "spp",
    course: Annotated[str, typer.Option(help="end-to-end, or by-block:epochs=2: each block against the --teacher's.")] = "end-to-end",
    lr: Annotated[float | None, typer.Option(help="Learning rate; default: the method's own.")] = None,
    batch: Annotated[int, typer.Option(help="Windows a step.", min=1)] = 1,
    decay: Annotated[float, typer.Option(help="Weight decay of what learns.", min=0.0)] = 0.0,
    teacher: Annotated[str | None, typer.Option(help="A model to learn from besides the text, usually the dense parent.")] = None,
    alpha: Annotated[float, typer.Option(help="The teacher's share of the loss.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="Of the teacher's and the student's distributions.")] = 2.0,
    train_text: Annotated[str | None, typer.Option(help="A UTF-8 text file to train on; default: the embedded Wikipedia articles that are not held out.")] = None,
    text: Text = None,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens to score before and after; a quoted figure wants 16384.", min=2)] = 8192,
    save_every: Annotated[int, typer.Option(help="Steps from checkpoint to checkpoint.", min=1)] = 20,
    recompute: Annotated[bool, typer.Option("--recompute", help="Less memory, more time: make activations again in backward.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Load in this dtype; default: as stored.")] = None,
    device: Device = "cpu",
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a pruned model back without losing a zero, and write it as a plain folder."""
    chosen, path, wanted = names.part(Adaptation, method), names.part(Course, course), count(tokens)
    how = Training(lr=lr, batch=batch, decay=decay, recompute=recompute, save_every=save_every, seed=seed)
    whole = Path(out or _beside(model)).absolute()
    check_out(whole, model, teacher, force=force)
    _refuse_same_text(train_text, text)
    checkpoint = Checkpoint(whole.with_name(f"{whole.name}.partial"), replace=force, on_resume=partial(_say_resumed, path.unit))
    with checkpoint.locked(), resumable(finished(checkpoint, path.unit)):
        clear_drafts(whole)
        loaded = load(model, dtype=dtype, device=device)
        need_plain(loaded)
        pruned_sites(loaded.model)
        origin = _origin(loaded.source)  # read before the work, so that a damaged one loses none
        parent = None if teacher is None else Teacher(_parent(load(teacher, dtype=dtype, device=device), loaded), alpha, temperature)
        windows, held_out = texts(loaded, wanted, train_text, text, eval_tokens, seed)
        before = _score(loaded, held_out)
        began = time.monotonic()
        with bars(as_json) as progress:
            found = path.run(loaded.model, windows, chosen, teacher=parent, training=how, checkpoint=checkpoint, progress=progress)
        timings = {"heal_s": time.monotonic() - began}
        record = {
            **_record(model, found, before, _score(loaded, held_out)),
            "course": {"name": path.name, **vars(path)},
            "options": {**vars(chosen), "lr": chosen.lr if lr is None else lr, "batch": batch, "decay": decay, "seed": seed},
            "teacher": None if teacher is None else {"model": teacher, "alpha": alpha, "temperature": temperature},
            "text": {"train": train_text or "embedded", "held_out": text or "embedded", "held_out_tokens": before["tokens"], "window": before["window"]},
            "pruned": origin,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        _write(loaded, whole, record, timings, force)
        checkpoint.remove()
    show({**record, "out": out or str(whole)}, as_json, _draw)


def count(text: str) -> int:
    """A number of tokens.

    >>> count("50k"), count("2M"), count("8192")
    (50000, 2000000, 8192)
    """
    scale = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    digits = text[:-1] if scale > 1 else text
    try:
        value = round(float(digits) * scale)
    except (ValueError, OverflowError) as error:
        raise BadInput(f"{text!r} tokens", "a number of tokens is written like 50k, 2M or 8192") from error
    if value < 1:
        raise BadInput(f"{text!r} tokens", "healing needs at least one token")
    return value


def _beside(model: str) -> str:
    if not Path(model).is_dir():
        raise BadInput(f"{model} is no folder here", "the result needs a name", "pass --out FOLDER")
    return f"{Path(model).absolute()}-healed"


def _parent(teacher: Loaded, student: Loaded) -> Any:
    """The teacher's model, once it is known to read the same tokens."""
    if teacher.tokenizer is not None and student.tokenizer is not None and teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise BadInput(f"teacher {teacher.spec}", "a teacher shares the student's vocabulary", "take the dense parent")
    return teacher.model


def _refuse_same_text(train: str | None, held_out: str | None) -> None:
    if train is not None and held_out is not None and Path(train).exists() and Path(held_out).exists() and Path(train).samefile(held_out):
        raise Refused(f"{train} is both --train-text and --text", "what was trained on cannot be held out", "name another text")


def texts(loaded: Loaded, tokens: int, train: str | None, held_out: str | None, eval_tokens: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Training windows, int64 [1, T] each, and held-out ids, int64 [N].

    Raises Refused where the two share a run of `RUN` tokens.
    """
    tokenizer = need_tokenizer(loaded)
    window = min(WINDOW, getattr(loaded.model.config, "max_position_embeddings", WINDOW), max(2, tokens))
    windows = [batch["input_ids"] for batch in calibration_batches(tokenizer, tokens, window, seed, train)]
    ids = heldout_ids(tokenizer, eval_tokens, held_out)
    seen = {run for w in windows for run in _runs(w[0].tolist())}
    shared = sum(run in seen for run in _runs(ids.tolist()))
    if shared:
        raise Refused(f"training and held-out text share {shared} runs of {RUN} tokens", "what was trained on cannot be held out", "name other texts (--train-text, --text)")
    return windows, ids


def _runs(ids: list[int]) -> Iterator[int]:
    return (hash(tuple(ids[i : i + RUN])) for i in range(len(ids) - RUN + 1))


def _score(loaded: Loaded, ids: Tensor) -> dict[str, Any]:
    window = min(WINDOW, getattr(loaded.model.config, "max_position_embeddings", WINDOW))
    return perplexity(loaded.model, ids, tokens=ids.numel(), window=window, bos=loaded.tokenizer.bos_token_id)


def _record(model: str, found: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": model,
        "method": found["method"],
        "tokens": found["tokens"],
        "steps": found["steps"],
        "loss_before": _loss(before),
        "loss_after": _loss(after),
        "perplexity_before": {"value": before["perplexity"], "interval": before["interval"]},
        "perplexity_after": {"value": after["perplexity"], "interval": after["interval"]},
        **{k: v for k, v in found.items() if k not in ("method", "tokens", "steps")},
    }


def _loss(scored: dict[str, Any]) -> dict[str, Any]:
    interval = scored["interval"]
    return {"value": scored["nll"], "interval": None if interval is None else torch.tensor(interval, dtype=torch.float64).log().tolist()}


def _origin(source: Path) -> dict[str, Any] | None:
    """How the model was pruned, where its folder says so; the errors it lists there are no longer true of the weights."""
    path = source / PRUNED
    if not path.is_file():
        return None
    try:
        record = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise BadFile(str(path), f"it is not a record of prune ({type(error).__name__}: {error})", "delete it, or prune again") from error
    return {key: record.get(key) for key in ("model", "recipe", "pattern", "density")}


def _write(loaded: Loaded, out: Path, record: dict[str, Any], timings: dict[str, Any], force: bool) -> None:
    saved = json.dumps({**record, "out": out.name}, indent=1) + "\n"
    extra = {RECORD: lambda path: path.write_text(saved)}
    save_dense(loaded.model, loaded.tokenizer, out, force=force, card=_card(record), timings=timings, extra=extra)


def _card(r: dict[str, Any]) -> Card:
    teacher = "" if r["teacher"] is None else f", teacher `{r['teacher']['model']}`"
    step = f"Healed with method `{r['method']}`{teacher}: {r['tokens']} tokens in {r['steps']} step{'' if r['steps'] == 1 else 's'}, on which all {r['zeros']['before']} zeros of {r['matrices']} matrices stayed zero."
    text = r["text"]
    how = f"perplexity on {text['held_out_tokens']} held-out tokens of {text['held_out']} text in windows of {text['window']}"
    figures = [Figure(f"perplexity {when} healing", _interval(r[f"perplexity_{when}"]), how) for when in ("before", "after")]
    return Card("healed", (step,), tuple(figures), RECORD)


def _interval(scored: dict[str, Any]) -> str:
    low, high = scored["interval"] or (None, None)
    return f"{scored['value']:.3f}" + ("" if low is None else f" (95%: {low:.3f} to {high:.3f})")


def _say_resumed(unit: str, done: int, total: int) -> None:
    err.print(f"resumed after {done} of {total} {unit}", highlight=False)


def _draw(r: dict[str, Any]) -> None:
    for when in ("before", "after"):
        scored = r[f"perplexity_{when}"]
        interval = "" if scored["interval"] is None else f"  (95%: {scored['interval'][0]:.2f} to {scored['interval'][1]:.2f})"
        line(f"perplexity {when:<6} {scored['value']:.3f}{interval}")
    line(f"{r['method']}: {r['trained_parameters']} numbers trained in {r['matrices']} matrices, {r['steps']} steps, {r['tokens']} tokens")
    line(f"{r['zeros']['lost']} of {r['zeros']['before']} zeros lost; written to {r['out']}")
