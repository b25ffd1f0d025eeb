"""What a person sees and what a machine reads: the same figures. Bars on a terminal, quiet in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

err = Console(stderr=True)


def show(record: Any, as_json: bool, draw: Callable[[Any], None]) -> None:
    """One JSON document on standard output, or what `draw` makes of the record."""
    if as_json:
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
    else:
        draw(record)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], title: str | None = None) -> None:
    """An aligned table; numbers to the right. It keeps its width in a pipe."""
    console = Console() if sys.stdout.isatty() else Console(width=160)
    drawn = Table(title=title, title_justify="left")
    for column in columns:
        drawn.add_column(column, justify="right" if any(isinstance(r.get(column), (int, float)) for r in rows) else "left")
    for row in rows:
        drawn.add_row(*(text(row.get(c)) for c in columns))
    console.print(drawn)


def line(words: str) -> None:
    sys.stdout.write(words + "\n")


def text(value: Any) -> str:
    """A cell: four digits of a float, an interval of floats, a shape of integers, a list of anything else.

    >>> text([0.5, 1.25]), text([2, 3]), text(["a", "b"]), text(None)
    ('0.5 to 1.25', '2 × 3', 'a, b', '')
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        kinds = {type(v) for v in value}
        return (" to " if float in kinds else " × " if kinds == {int} else ", ").join(text(v) for v in value)
    return "" if value is None else str(value)


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


@contextmanager
def bars(quiet: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A function (done, total, label) that draws one bar with the time left."""
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def update(done: int, total: int, label: str) -> None:
            progress.update(task, completed=done, total=total, description=label[:32])

        yield update
