"""What a person reads in a table: intervals are no shapes."""

from __future__ import annotations

import io
import sys

import pytest

from rarefy.cli.compare import COLUMNS
from rarefy.cli.output import table, text
from rarefy.cli.prune import _draw as draw_prune


def test_an_interval_reads_from_to_and_a_shape_is_a_product() -> None:
    assert text([0.01, 0.0234567]) == "0.01 to 0.02346"
    assert text([-0.5, 0]) == "-0.5 to 0"
    assert text((10, 64)) == "10 × 64"
    assert text([]) == ""


def test_a_table_of_compare_shows_the_interval(capsys: pytest.CaptureFixture[str]) -> None:
    table([{"method": "a", "interval": [1.5, 2.25], "value": 3.0}, {"method": "dense", "interval": None}], COLUMNS)
    out = capsys.readouterr().out
    assert "1.5 to 2.25" in out
    assert "×" not in out


def test_a_matrix_goes_by_one_name_in_every_block_and_expert_and_emptied_ones_count(capsys: pytest.CaptureFixture[str]) -> None:
    sites = [
        {"name": f"layers.{block}.experts.up[{expert}]", "shape": [2, 4], "kept": kept, "density": kept / 8, "error": 0.5, "error_mask_only": 0.5, "error_on": "inputs"}
        for block, expert, kept in ((0, 0, 8), (0, 1, 0), (1, 0, 8), (1, 1, 0))
    ]
    draw_prune({"recipe": "r", "pattern": "2:4", "model": "m", "sites": sites, "density": 0.5, "density_requested": 0.5, "out": "o"})
    row = next(line for line in capsys.readouterr().out.splitlines() if "layers.experts.up" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["layers.experts.up", "4", "0.5", "0.5", "0.5"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", ["30", "60", "100"])
def test_a_narrow_terminal_cuts_no_cell(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout", Terminal())
    row = {"method": "magnitude", "pattern": "block:4x1", "density": 0.5, "value": 97.37, "relative": 0.0051, "interval": [0.003289, 0.007113], "bytes": 272128, "error": 0.2653}
    table([row], COLUMNS, "perplexity")
    shown = sys.stdout.getvalue()
    assert "…" not in shown
    assert all(word in shown for word in ("magnitude", "block:4x1", "0.003289", "0.007113", "272128"))
    assert ("┃" in shown) == (columns == "100")
