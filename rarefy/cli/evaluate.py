"""`rarefy eval`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any

import typer

from rarefy.cli import names
from rarefy.cli.arguments import Device, Json, Model, Seed, Text, Tokens
from rarefy.cli.loading import load
from rarefy.cli.main import app
from rarefy.cli.output import line, show, table
from rarefy.cli.prune import need_tokenizer
from rarefy.core.roles import Overflow
from rarefy.core.trace import Trace
from rarefy.hub.load import Loaded
from rarefy.hub.routers import adapt
from rarefy.hub.text import heldout_ids
from rarefy.probes.expert_load import expert_load
from rarefy.probes.harness import harness, need_harness
from rarefy.probes.perplexity import perplexity

EXAMPLES = "Examples:  rarefy eval demo   ·   rarefy eval half --tokens 4096 --json   ·   rarefy eval half --tasks hellaswag,arc_easy"


@app.command("eval", epilog=EXAMPLES)
def evaluate(
    model: Model,
    text: Text = None,
    tokens: Tokens = 16384,
    window: Annotated[int, typer.Option(help="Tokens a window, BOS included.", min=2)] = 512,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window; default: no overlap.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Instead of perplexity: tasks of lm-evaluation-harness, separated by commas (extra 'eval').")] = None,
    task_folder: Annotated[str | None, typer.Option(help="Where YAML tasks of your own lie.")] = None,
    shots: Annotated[int | None, typer.Option(help="Examples in a task's prompt; default: the task's own.", min=0)] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many documents of each task: a check, not a figure to quote.", min=1)] = None,
    batch: Annotated[int, typer.Option(help="Sequences a forward, for tasks.", min=1)] = 1,
    overflow: Annotated[
        str | None, typer.Option(help="In a mixture of experts, a rule that bounds how many tokens an expert takes, e.g. score-capacity:factor=1.25; see `rarefy methods`.")
    ] = None,
    seed: Seed = 0,
    dtype: Annotated[str | None, typer.Option(help="Load in this dtype; default: as stored.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Perplexity on held-out text, with its protocol and its 95% interval; or benchmark tasks."""
    if tasks is not None:
        need_harness()
    loaded = load(model, dtype=dtype, device=device)
    tokenizer = need_tokenizer(loaded)
    if overflow is not None:
        adapt(loaded.model, names.part(Overflow, overflow))
    if tasks is not None:
        record = harness(loaded.model, tokenizer, names.listed(tasks), shots=shots, limit=limit, batch=batch, seed=seed, folder=task_folder)
        show({"model": model, "dtype": _dtype(loaded), **record}, as_json, _draw_tasks)
        return
    ids = heldout_ids(tokenizer, tokens, text).to(device)
    with nullcontext() if overflow is None else Trace(loaded.model) as trace:
        record = perplexity(loaded.model, ids, tokens=tokens, window=window, stride=stride, bos=tokenizer.bos_token_id)
    bounded = {} if trace is None else {"overflow": overflow, "experts": expert_load(trace.entries)}
    show({**record, **bounded, "model": model}, as_json, _draw)


def _dtype(loaded: Loaded) -> str:
    return str(loaded.model.dtype).removeprefix("torch.")


def _draw(r: dict[str, Any]) -> None:
    interval = "" if r["interval"] is None else f"  (95%: {r['interval'][0]:.2f} to {r['interval'][1]:.2f})"
    line(f"perplexity {r['perplexity']:.3f}{interval}")
    line(f"{r['tokens']} tokens in {r['windows']} windows of {r['window']}, stride {r['stride']}, bos {r['bos']}, {r['dtype']}")
    if "overflow" in r:
        e = r["experts"]
        line(f"{r['overflow']}: {e['dropped']:.2%} of the assignments dropped; at most {e['busiest']:.2f} times the mean for one expert of a layer in a window")
        line("What an expert takes depends on the whole window: next-token figures see later tokens that much.")
    if r["tokens"] < 16000:
        line("Fewer than 16,000 tokens: a check, not a figure to quote.")


def _draw_tasks(r: dict[str, Any]) -> None:
    table(r["tasks"], ["task", "shots", "samples", "metric", "filter", "value", "stderr"], f"{r['model']}: lm-evaluation-harness {r['harness']}, {r['dtype']}")
    if r["limit"] is not None:
        line(f"Only {r['limit']} documents of each task: a check, not a figure to quote.")
