"""Benchmark tasks by the language model evaluation harness: the model as loaded, packed layers included."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rarefy.core.errors import BadInput, MissingExtra

PACKAGE = "lm_eval"


def need_harness() -> None:
    """MissingExtra where the harness is not installed: to be asked before a model is loaded."""
    try:
        present = find_spec(PACKAGE) is not None
    except ValueError:  # a stand-in without a spec
        present = True
    if not present:
        raise MissingExtra(PACKAGE, "eval")


def harness(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, shots: int | None = None, limit: int | None = None, batch: int = 1, seed: int = 0, folder: str | Path | None = None
) -> dict[str, Any]:
    """Score tasks of lm-evaluation-harness with its own `HFLM` around the model we loaded.

    Args:
        model: a causal language model of transformers' kind, in eval mode, on its device.
        tasks: names of tasks or groups; see `lm-eval ls tasks`. Most fetch their data set on first use.
        shots: examples in the prompt; None: each task's own number.
        limit: only the first documents of each task: a check, not a figure to quote.
        batch: sequences a forward.
        folder: where YAML tasks of your own lie.

    Returns:
        {harness (version), tasks: [{task, version, shots, samples, metric, filter, value, stderr}], limit, batch, seed}:
        values as the harness gives them, accuracy in [0, 1]; stderr None where it gives none.

    Raises:
        MissingExtra: the harness is not installed.  BadInput: no task, or one that the harness does not know.

    Source: github.com/EleutherAI/lm-evaluation-harness. Prompts, scoring and data are the harness's; we add nothing.
    """
    need_harness()
    if not tasks:
        raise BadInput("no tasks", "at least one task is scored", "pass for example --tasks hellaswag,arc_easy")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise BadInput(f"task {', '.join(unknown)}", "the harness has no task of that name", "list its names with `lm-eval ls tasks`, or name the folder of your own")
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch),
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        **seeds,
    )
    return {"harness": version(PACKAGE), "tasks": _rows(found), "limit": limit, "batch": batch, "seed": seed}


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for task, figures in found["results"].items():
        head = {
            "task": task,
            "version": str(found["versions"].get(task, "")),
            "shots": found["n-shot"].get(task),
            "samples": found["n-samples"].get(task, {}).get("effective"),
        }
        for key, value in figures.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                rows.append({**head, "metric": metric, "filter": kind, "value": _number(value), "stderr": _number(figures.get(f"{metric}_stderr,{kind}"))})
    return rows


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
