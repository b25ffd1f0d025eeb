"""`rarefy bench`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import typer

from rarefy.cli.arguments import Json, Text
from rarefy.cli.loading import quiet
from rarefy.cli.main import app
from rarefy.cli.output import bars, err, show, table
from rarefy.core.discover import pick
from rarefy.core.errors import BadInput, Refused
from rarefy.probes.bench import MEMORY, PEERS, Subject
from rarefy.probes.bench import bench as bench_linear
from rarefy.probes.experts_bench import EXPERTS_PEERS, Sizes, bench_experts
from rarefy.probes.ggml import NAMES
from rarefy.probes.skip_bench import bench_skip

EPILOG = (
    "Examples:  rarefy bench --layout bitmask,csr --density 0.5,0.1 --batch 1,64   ·   rarefy bench --layout block@block:4x1,n_m@2:4 --peer torch-dense,own-dense --json   ·   "
    "rarefy bench --op skip --layout columns --density 0.5,0.25   ·   rarefy bench --op experts --batch 1,16,128   ·   rarefy bench --op decode --model demo --model half-packed --model demo@transformers   ·   rarefy bench --op decode --model small@native+int8 --model demo@llama.cpp"
)
PROMPT = 8  # tokens
LINEAR = ("layout", "pattern", "shape", "density", "batch", "peer", "ratio", "spread", "ours_us", "peer_us", "gb_per_s", "roofline")
EXPERTS = ("experts", "k", "width", "inner", "tokens", "peer", "ratio", "spread", "ours_us", "peer_us", "gb_per_s", "roofline")
DECODE = ("model", "engine", "precision", "density", "claim", "ratio", "spread", "tokens_per_s", "perplexity", "interval", "model_bytes", "dominated_by")


@dataclass(frozen=True)
class Asked:
    """The options of all operations, as given."""

    layout: str
    shape: str
    density: str
    batch: str
    peer: str | None
    experts: str
    rounds: int
    memory: int
    seed: int
    models: list[str]
    tokens: int
    scored: int
    text: str | None
    quiet: bool


def _peers(asked: Asked, usual: Iterable[str]) -> list[str]:
    return list(usual) if asked.peer is None else asked.peer.split(",")


def _products(run: Callable[..., list[dict[str, Any]]], asked: Asked) -> list[dict[str, Any]]:
    subjects, shapes = [Subject.parse(text) for text in asked.layout.split(",")], [_shape(text) for text in asked.shape.split(",")]
    densities, batches, peers = _numbers(asked.density, float), _numbers(asked.batch, int), _peers(asked, ("torch-dense", "own-dense"))
    with bars(quiet=asked.quiet) as progress:
        return run(subjects, shapes, densities, batches, peers, rounds=asked.rounds, seed=asked.seed, memory=asked.memory, progress=progress)


def _experts(asked: Asked) -> list[dict[str, Any]]:
    quiet()
    layers, tokens = [Sizes.parse(text) for text in asked.experts.split(",")], _numbers(asked.batch, int)
    with bars(quiet=asked.quiet) as progress:
        return bench_experts(layers, tokens, _peers(asked, EXPERTS_PEERS), rounds=asked.rounds, seed=asked.seed, memory=asked.memory, progress=progress)


def _decode(asked: Asked) -> list[dict[str, Any]]:
    if len(asked.models) < 2:
        raise BadInput(f"{len(asked.models)} models", "decoding is compared between two or more, the first of which is the peer", "pass --model demo --model DIR")
    from rarefy.hub.text import heldout_ids
    from rarefy.probes.decoding import race
    from rarefy.probes.racers import racers

    quiet()
    running = racers(asked.models, lambda words: err.print(words, highlight=False, markup=False, soft_wrap=True))
    tokenizer = next((each.tokenizer for each in running if each.tokenizer is not None), None)
    if tokenizer is None:
        raise BadInput(", ".join(asked.models), "none of them has a tokenizer for the text that is scored", "name a model folder among them")
    ids = heldout_ids(tokenizer, asked.scored, asked.text)
    with bars(quiet=asked.quiet) as progress:
        return race(running, ids[None, :PROMPT], ids, bos=tokenizer.bos_token_id, tokens=asked.tokens, rounds=asked.rounds, progress=progress)


@dataclass(frozen=True)
class Op:
    """What is timed, and the columns of its table."""

    run: Callable[[Asked], list[dict[str, Any]]]
    columns: tuple[str, ...]


OPS = {
    "linear": Op(partial(_products, bench_linear), LINEAR),
    "skip": Op(partial(_products, bench_skip), LINEAR),
    "experts": Op(_experts, EXPERTS),
    "decode": Op(_decode, DECODE),
}


@app.command(epilog=EPILOG)
def bench(
    op: Annotated[
        str,
        typer.Option(
            help="What is timed: linear (one product), skip (one with dense weights and zeros in x, of which --density is the rest), experts (a routed layer's) or decode (whole models)."
        ),
    ] = "linear",
    layout: Annotated[str, typer.Option(help="Layouts, comma-separated; LAYOUT@PATTERN for weights that have a structure, e.g. n_m_g@2:4:16.")] = "bitmask,csr",
    shape: Annotated[str, typer.Option(help="Shapes OUTxIN, comma-separated.")] = "2048x8192",
    density: Annotated[str, typer.Option(help="Shares of weights (skip: of inputs) that are not zero, comma-separated.")] = "0.5",
    batch: Annotated[str, typer.Option(help="Rows of x (experts: tokens), comma-separated.")] = "1",
    peer: Annotated[
        str | None,
        typer.Option(
            help=f"What to compare with, comma-separated; a product: {', '.join([*PEERS, *NAMES])}, or any layout (default: torch-dense,own-dense); experts: {', '.join(EXPERTS_PEERS)} (default: all)."
        ),
    ] = None,
    experts: Annotated[str, typer.Option(help="Layers of gated experts EXPERTS:K:WIDTH:INNER, comma-separated.")] = "64:8:512:512",
    model: Annotated[list[str] | None, typer.Option(help="To decode with: MODEL, MODEL@ENGINE or MODEL@native+HEAD; repeat it, the first one is the peer.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens that are decoded in a round.", min=1, max=400)] = 32,
    scored: Annotated[int, typer.Option(help="Held-out tokens of the perplexity beside a model's speed.", min=2)] = 4096,
    text: Text = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; their median is reported.", min=5)] = 7,
    memory: Annotated[int, typer.Option(help="Bytes for copies of the weights, which keep them out of cache.", min=1)] = MEMORY,
    max_load: Annotated[float | None, typer.Option(help="Refuse above this load a core; default: warn above 0.5.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and inputs.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Sparse products, and models that decode, against others on this machine, interleaved, each checked or scored beside its speed."""
    chosen = pick(OPS, op, "op")
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if max_load is not None and load > max_load:
        raise Refused(f"a load of {load:.2f} a core", f"this run is to refuse above {max_load:g}", "wait until the machine is quiet")
    rows = chosen.run(Asked(layout, shape, density, batch, peer, experts, rounds, memory, seed, model or [], tokens, scored, text, as_json))
    for warning in sorted({row["warning"] for row in rows if row["warning"]}):
        err.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    show(rows, as_json, lambda rows: _draw(rows, chosen.columns))
    if any(row["ratio"] is None for row in rows):
        raise typer.Exit(1)


def _draw(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    drawn = [{**row, "shape": "x".join(map(str, row.get("shape", ()))), "spread": None if row["ratio"] is None else [row["ratio_min"], row["ratio_max"]]} for row in rows]
    table(drawn, columns, title="ratio: how many times as fast as the peer; spread: lowest and highest round")


def _shape(text: str) -> tuple[int, int]:
    rows, by, columns = text.partition("x")
    if not (by and rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        raise BadInput(f"shape {text!r}", "a shape is OUTxIN", "pass for example 2048x8192")
    return int(rows), int(columns)


def _numbers(text: str, kind: type[Any]) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(f"{text!r}", f"it is no list of {'whole ' if kind is int else ''}numbers", "pass for example 1,8") from error
    if not all(number > 0 for number in found):
        raise BadInput(f"{text!r}", "every number is above 0")
    return found
