"""What a person reads in a table: intervals are no shapes."""

from __future__ import annotations

import pytest

from rarefy.cli.compare import COLUMNS
from rarefy.cli.output import table, text


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
