"""What is measured of a site, one idea per file."""

from __future__ import annotations

from rarefy.core.discover import methods, pick
from rarefy.core.roles import ModelStatistic, Statistic


def statistic(name: str) -> Statistic | ModelStatistic:
    """The discovered statistic of that name, streamed or of the whole model."""
    known: dict[str, type[Statistic] | type[ModelStatistic]] = {**methods(Statistic), **methods(ModelStatistic)}
    return pick(known, name, "statistic")()
