"""The tutorial runs: its commands on a tiny model, its Python as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rarefy.cli.main import main
from tests.test_cli import tiny

__all__ = ["tiny"]
PAGE = (Path(__file__).parent.parent / "docs" / "first-five-minutes.md").read_text()


def test_every_command_of_the_tutorial_runs(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 7
    for command in commands:
        argv = shlex.split(command.replace("MODEL", tiny).replace("TEXT", f"{tiny}/text.txt"))
        assert main(argv[1:]) == 0, command
    assert (tmp_path / "half" / "report.html").is_file()
    assert (tmp_path / "half-plain" / "model.safetensors").read_bytes() == (tmp_path / "half" / "model.safetensors").read_bytes()


def test_the_python_of_the_tutorial_runs() -> None:
    pytest.importorskip("sklearn")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    scope: dict[str, object] = {}
    for block in blocks:
        exec(block, scope)
    assert scope["record"]


def test_the_python_of_the_training_page_runs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scope: dict[str, object] = {}
    exec(block, scope)
    assert scope["step"] == 99


def test_the_training_page_names_every_kind_of_penalty_and_parts_that_exist() -> None:
    from rarefy.core.discover import methods
    from rarefy.core.roles import Penalty
    from rarefy.weights import penalties

    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    rows = re.findall(r"(?m)^\| (\w+) \| .* \| `(\w+)`.*\|$", page)
    parts = {kind.__name__: kind for kind in methods(Penalty).values()}
    kinds = {name.removesuffix("Penalty").lower(): kind for name, kind in vars(penalties).items() if name.endswith("Penalty") and kind is not Penalty}
    assert {kind for kind, _ in rows} == set(kinds)
    assert all(issubclass(parts[part], kinds[kind]) for kind, part in rows)
