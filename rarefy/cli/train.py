"""`rarefy train`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rarefy.cli import names
from rarefy.cli.arguments import Json, Seed
from rarefy.cli.main import app
from rarefy.cli.output import bars, line, show, table
from rarefy.cli.prune import check_density
from rarefy.core.discover import pick, train_recipes
from rarefy.core.roles import Allocation, Task
from rarefy.weights.source_net import SourceNet
from rarefy.weights.train import train as train_task


@app.command(
    epilog="Examples:  rarefy train digits --recipe gradual-magnitude --density 0.1   ·   rarefy train digits --recipe rigl --checkpoints run1   ·   rarefy train char_lm --recipe static --density 1 --router top-p"
)
def train(
    task: Annotated[str, typer.Argument(help="See `rarefy methods`.")],
    recipe: Annotated[str, typer.Option(help="A training recipe; see `rarefy methods`.")] = "rigl",
    density: Annotated[float, typer.Option(help="Fraction of the weights that is kept at the end.")] = 0.1,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 300,
    allocation: Annotated[str | None, typer.Option(help="In place of the recipe's, e.g. erk or uniform; see `rarefy methods`.")] = None,
    within: Annotated[str | None, typer.Option(help="A random source network that training never leaves: a density, or e.g. balanced:0.5.")] = None,
    router: Annotated[str | None, typer.Option(help="For a task with a routed layer, e.g. top-p or gap:threshold=0.2; see `rarefy methods`.")] = None,
    seed: Seed = 0,
    checkpoints: Annotated[str | None, typer.Option(help="A folder: saves as it goes, resumes, and holds the result.")] = None,
    as_json: Json = False,
) -> None:
    """Train a small task sparse, from scratch."""
    chosen = pick(train_recipes(), recipe, "training recipe")
    check_density(density)
    problem, split = names.part(Task, task), None if allocation is None else names.part(Allocation, allocation)
    with bars(as_json) as progress:
        record = train_task(
            problem,
            chosen,
            density=density,
            steps=steps,
            seed=seed,
            options=None if router is None else {"router": router},
            allocation=split,
            within=None if within is None else SourceNet.parse(within),
            checkpoint_dir=checkpoints,
            progress=lambda done, total: progress(done, total, f"train {task}"),
        )
    show(record, as_json, _draw)


def _draw(record: dict[str, Any]) -> None:
    table(record["sites"], ["key", "shape", "nnz"], f"{record['recipe']} ({record['allocation']}) on {record['task']}")
    for number, state in enumerate(record.get("states", ())):
        line(f"state {number + 1}: {_figures(state)}")
    line(f"density {record['density']:.4g} of {record['density_requested']:.4g} asked; {_figures(record['metric'])}")


def _figures(metric: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in metric.items())
