"""Tables and figures of a record's matrices: by position, a fold a block, with totals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rarefy.probes.figures.bars import Series, bars
from rarefy.probes.figures.histograms import Counts, binned, histograms
from rarefy.probes.html import fold, number, table
from rarefy.probes.magnitudes import FINE, LOWEST, Magnitudes
from rarefy.probes.places import split_name

Site = Mapping[str, Any]
LABELS = 10  # of blocks, under a figure
DECADES = 5
FEWEST = 3  # matrices of which there is a distribution
NARROWEST = 0.001  # share of a kind's weights at each end that its histogram may leave out


@dataclass(frozen=True)
class Column:
    """A figure of a matrix as text, and of some together; '' where they have none."""

    head: str
    one: Callable[[Site], str]
    all: Callable[[Sequence[Site]], str]


def by_block(caption: str, columns: Sequence[Column], sites: Sequence[Site]) -> str:
    """A row a block with its totals, then each block's matrices to unfold; of a single block, its table."""
    blocks = grouped(sites)
    if not blocks:
        return ""
    head = [column.head for column in columns]
    total = ["all", f"{len(sites):,}", *(column.all(sites) for column in columns)]
    overview = table(
        f"{caption}, a row a block.",
        ["block", "matrices", *head],
        [[block, f"{len(found):,}", *(column.all(found) for column in columns)] for block, found in blocks.items()],
        total,
    )
    folds = [fold(f"{block}: {number(len(found), 'matrix', 'matrices')}", _block(block, caption, columns, found), unfolded=len(blocks) == 1) for block, found in blocks.items()]
    return (overview if len(blocks) > 1 else "") + "".join(folds)


def _block(block: str, caption: str, columns: Sequence[Column], sites: Sequence[Site]) -> str:
    rows = [[split_name(site["name"])[1], *(column.one(site) for column in columns)] for site in sites]
    return table(f"{caption}: {block}.", ["matrix", *(column.head for column in columns)], rows, ["together", *(column.all(sites) for column in columns)] if len(sites) > 1 else ())


def grouped(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """{block: its matrices}, in the order of the record."""
    blocks: dict[str, list[Site]] = {}
    for site in sites:
        blocks.setdefault(split_name(site["name"])[0], []).append(site)
    return blocks


def mean(values: Sequence[float]) -> str:
    """
    >>> mean([0.25, 0.5])
    '0.3750 (mean)'
    """
    return f"{sum(values) / len(values):.4f} (mean)" if values else "-"


def along(sites: Sequence[Site], series: Series, what: str, unit: str = "") -> str:
    """A bar a matrix, in the order of the record, with the numbers of the blocks below."""
    blocks = list(grouped(sites).items())
    marks, start, every = [], 0, -(-len(blocks) // LABELS)
    for i, (block, found) in enumerate(blocks):
        name = block.rpartition(".")[2]
        if i % every == 0 and name.isdigit():
            marks.append((start + len(found) / 2, name))
        start += len(found)
    ordered = [site for _, found in blocks for site in found]
    return bars(ordered, series, what, "matrices, block by block" if marks else "matrices in order", marks, unit)


def spread(sites: Sequence[Site], of: Sequence[tuple[str, str]], what: str) -> str:
    """How many matrices have which value, a row a figure: (key, what it is)."""
    found = [(label, [float(site[key]) for site in sites]) for key, label in of]
    together = [value for _, values in found for value in values]
    if len(sites) < FEWEST or max(together) <= min(together):
        return ""
    low, high = min(together), max(together)
    series = [Counts(label, _middle(values), binned(values, low, high)) for label, values in found]
    return histograms(series, low, high, what, f"Columns count matrices ({len(sites):,} together).")


def _middle(values: Sequence[float]) -> str:
    ordered = sorted(values)
    return f"median {ordered[len(ordered) // 2]:.3g}, from {ordered[0]:.3g} to {ordered[-1]:.3g}"


def sizes(found: Sequence[Magnitudes]) -> str:
    """The weights that are not zero by size, a row a kind of matrix, on one scale of octaves."""
    held = [kind for kind in found if kind.kept]
    if not held:
        return ""
    ends = [_ends(kind) for kind in held]
    first, last = min(low for low, _ in ends), max(high for _, high in ends)
    low, high = LOWEST + first / FINE, LOWEST + (last + 1) / FINE
    series = [Counts(kind.kind, _sizes(kind), [sum(kind.counts[: first + 1]), *kind.counts[first + 1 : last], sum(kind.counts[last:])]) for kind in held]
    some = [kind for kind in held if kind.read < kind.matrices]
    sampled = f" Of a kind, {max(kind.read for kind in held)} of {max(kind.matrices for kind in held)} matrices were read." if some else ""
    caption = f"Columns count weights, each row to its own height; the scale is logarithmic, and its end columns hold what lies beyond (a thousandth at most).{sampled}"
    return histograms(series, low, high, "size of the weights that are not zero", caption, lambda octave: f"{2**octave:.2g}", _decades(low, high))


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten between two octaves, as octaves, at most `DECADES` of them; none where there is one or none.

    >>> [round(2**octave, 6) for octave in _decades(-10, 0)]
    [0.001, 0.01, 0.1, 1.0]
    """
    powers = range(math.ceil(low / math.log2(10)), math.floor(high / math.log2(10)) + 1)
    return [power * math.log2(10) for power in powers[:: -(-len(powers) // DECADES)]] if len(powers) > 1 else []


def _ends(kind: Magnitudes) -> tuple[int, int]:
    """The bins between which all but a thousandth at each end lie."""
    seen, inside, least = 0, [], NARROWEST * kind.kept
    for i, count in enumerate(kind.counts):
        if seen + count > least and seen < kind.kept - least:
            inside.append(i)
        seen += count
    first = min(inside[0], len(kind.counts) - 2)
    return first, max(inside[-1], first + 1)


def _sizes(kind: Magnitudes) -> str:
    return f"median {kind.quantile(0.5):.2g}; 5% to 95%: {kind.quantile(0.05):.2g} to {kind.quantile(0.95):.2g}"
