"""The page on layouts runs: its Python as it stands, its commands on a tiny model, and what it says is printed is."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rarefy.cli.main import main
from rarefy.core.errors import BadInput
from rarefy.layouts import LAYOUTS, registry
from rarefy.layouts.formats import Format
from rarefy.layouts.selections import All, AtLeast, Largest, Same
from rarefy.weights.patterns.n_m import NM
from rarefy.weights.patterns.n_m_g import NMG
from tests.test_cli import tiny

__all__ = ["tiny"]
PAGE = (Path(__file__).parent.parent / "docs" / "layouts.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_python_of_the_page_runs_and_prints_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_operators", "_selections"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # parts are pickled by the name of their module
    scope = vars(page)
    try:
        for block in blocks("python"):
            exec(block, scope)
        assert str(scope["seen"][0].message) == blocks("text")[0].rstrip()
        assert type(LAYOUTS["coordinates"]).__module__ == "page"
    finally:
        LAYOUTS.pop("coordinates", None)


def test_the_table_of_selections_is_what_they_say() -> None:
    rows = {cell: (passes.partition(":")[0], inline) for cell, passes, inline in re.findall(r"(?m)^\| (.*?) \| (.*?) \| (.*?) \|$", PAGE)}
    parts = {
        "`All`, `Same`, `AtLeast`": [All(), Same(), AtLeast()],
        "`Largest` with `n:m` or `n:m:g`": [Largest(pattern=NM()), Largest(pattern=NMG())],
        "`Largest` otherwise": [Largest()],
    }
    for cell, selections in parts.items():
        for selection in selections:
            assert rows[cell][0] == selection.passes
            if rows[cell][1] == "yes":
                Format(inline=selection)
            else:
                with pytest.raises(BadInput):
                    Format(inline=selection)


def test_every_command_of_the_page_runs(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        argv = shlex.split(command.replace("MODEL", tiny).replace("TEXT", f"{tiny}/text.txt"))
        extra = ["--memory", "1", "--max-load", "1e9"] if argv[1] == "bench" else []
        assert main([*argv[1:], *extra]) == 0, f"{command}: {capsys.readouterr().err}"
    assert '"layout": "n_m_g"' in (tmp_path / "grouped-packed" / "config.json").read_text()
