"""The page for those who come from another tool runs: its Python as it stands, its commands on a tiny model, and its tables name what exists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from rarefy.cli import names
from rarefy.cli.main import main
from rarefy.core.discover import recipes
from rarefy.weights.patterns import parse_pattern
from tests.test_cli import tiny

__all__ = ["tiny"]
PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()


def test_the_page_runs_from_top_to_bottom(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"MODEL": tiny}
    blocks = re.findall(r"```(python|sh)\n(.*?)```", PAGE, re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "python", "python", "sh", "sh", "sh"]
    for language, block in blocks:
        if language == "python":
            exec(block, scope)
            continue
        for command in block.splitlines():
            argv = shlex.split(command.replace("MODEL", tiny).replace("TEXT", f"{tiny}/text.txt"))
            assert main(argv[1:]) == 0, f"{command}: {capsys.readouterr().err}"
    assert json.loads((tmp_path / "masked-packed" / "pack.json").read_text())["packed"] == 14
    compressed = json.loads((tmp_path / "compressed" / "prune.json").read_text())
    assert compressed["pattern"] == "2:4" and compressed["density"] == 0.5 and len(compressed["sites"]) == 12
    assert not any("o_proj" in site["name"] for site in compressed["sites"])


def test_the_command_is_what_the_llm_compressor_recipe_says() -> None:
    yaml = pytest.importorskip("yaml")
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    ((modifier, said),) = yaml.safe_load(text)["sparsity_stage"]["sparsity_modifiers"].items()
    command = next(line for line in PAGE.splitlines() if line.endswith("--out compressed"))
    argv = shlex.split(command)
    option = dict(zip(argv[3::2], argv[4::2], strict=True))
    assert option["--recipe"] == modifier.removesuffix("Modifier").lower() and option["--pattern"] == said["mask_structure"]
    assert float(option["--density"]) == 1 - said["sparsity"] and option["--exclude"] == said["ignore"][1].replace("re:.", "")
    solver = recipes()["sparsegpt"].solver
    assert (solver.block, solver.damp) == (said["block_size"], said["dampening_frac"])  # type: ignore[attr-defined]


def test_what_the_tables_name_exists() -> None:
    known = recipes()
    for name in ("magnitude", "wanda", "sparsegpt", "owl"):
        assert (name in known and f"`{name}`" in PAGE) or f"--recipe {name}" in PAGE
    for pattern in ("rows", "columns", "2:4", "4:8"):
        parse_pattern(pattern)
    names.recipe("magnitude", criterion="random", allocation="global")
    names.recipe("wanda", allocation="outlier-share:spread=0.08")
    assert torch.nn.utils.prune.l1_unstructured
