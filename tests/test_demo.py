"""The demo's flow on a tiny model: search, table, report; a second run reuses what is finished and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rarefy.cli import demo
from rarefy.cli.main import main
from rarefy.hub.load import load
from tests.test_cli import tiny

__all__ = ["tiny"]


def test_the_demo_runs_and_reuses(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "load", lambda spec: load(tiny))
    argv = ["demo", "--out", str(tmp_path / "demo"), "--calibration-tokens", "1024", "--tokens", "1024"]
    code = main(argv)
    first, err = capsys.readouterr()
    assert code == 0, err
    assert first.count("sparsegpt") >= 2 and "over_base" in first and "tokens/s" in first
    assert (tmp_path / "demo" / "model" / "report.html").is_file()
    sparse = json.loads((tmp_path / "demo" / "sparse" / "optimize.json").read_text())
    row = next(row for row in sparse["forms"] if row["form"] == sparse["chosen"])
    assert ("Zeros that pay" in first) == (row["over_base_min"] > 1) and f"{tmp_path}/demo/sparse" in first
    assert first.strip().splitlines()[-1].startswith("report: ")
    assert main(argv) == 0
    again = capsys.readouterr().out
    assert "is reused" in again
    assert again[again.index("Perplexity over") :].count("True") == 6
