"""What a release promises: one version everywhere, declared and tested versions as the page says, a light import."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rarefy

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGE = (ROOT / "docs" / "platforms.md").read_text()


def test_there_is_one_version() -> None:
    newest = re.search(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text())
    assert newest is not None
    assert rarefy.__version__ == PROJECT["version"] == newest[1]


def requirements() -> dict[str, tuple[str, str]]:
    """{package: (extra, declared range)} of what a user installs."""
    found = {"python": ("", PROJECT["requires-python"])}
    extras = PROJECT["optional-dependencies"]
    groups = {"": PROJECT["dependencies"], **{name: extras[name] for name in extras if name not in ("dev", "release")}}
    for extra, lines in groups.items():
        for line in lines:
            name = re.match(r"[\w-]+", line)
            assert name is not None
            found[name[0]] = extra, line[len(name[0]) :]
    return found


def test_the_page_of_platforms_says_what_is_declared_and_tested() -> None:
    rows = {name: (extra, declared, tested) for name, extra, declared, tested in re.findall(r"(?m)^\| ([\w-]+) \| (\w*) ?\| `(.*?)` \| (.*?) \|$", PAGE)}
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: row[:2] for name, row in rows.items()} == requirements()
    for name, (_, declared, tested) in rows.items():
        if name in pins:
            assert tested == pins[name]
            assert within(pins[name], declared), f"{name} {pins[name]} is not {declared}"
        else:
            assert tested == {"python": "3.11"}.get(name, "not in CI")


def within(version: str, declared: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return version in SpecifierSet(declared)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the tier that is tested")
def test_the_suite_runs_with_the_versions_that_the_page_calls_tested() -> None:
    import torch
    import transformers

    for name, module in (("torch", torch), ("transformers", transformers)):
        assert f"| {module.__version__.partition('+')[0]} |" in next(line for line in PAGE.splitlines() if line.startswith(f"| {name} |"))


def test_every_package_that_is_imported_is_declared() -> None:
    """Ours may import the standard library, what pyproject.toml names, and what those always bring (tqdm, yaml, huggingface_hub, tokenizers with transformers, filelock with torch, scipy with scikit-learn)."""
    import ast

    brought = {"tqdm", "yaml", "huggingface_hub", "tokenizers", "filelock", "scipy"}
    declared = {name.replace("-", "_") for name in requirements()} | {"sklearn", "lm_eval"} | brought
    allowed = declared | set(sys.stdlib_module_names) | {"rarefy", "__future__"}
    for path in sorted((ROOT / "rarefy").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.relative_to(ROOT)} imports {name}, which no extra declares"


def imported(statement: str) -> dict[str, float]:
    """{module: milliseconds of its own} that a fresh interpreter loads for a statement."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", statement], capture_output=True, text=True, check=True)
    lines = re.findall(r"(?m)^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", done.stderr)
    return {name: int(own) / 1000 for own, name in lines}


def test_importing_rarefy_loads_neither_torch_nor_the_library() -> None:
    loaded = imported("import rarefy")
    ours = {name for name in loaded if name.split(".")[0] == "rarefy"}
    assert ours == {"rarefy", "rarefy.hub", "rarefy.hub.lazy"}
    assert not {"torch", "numpy", "transformers", "typer"} & set(loaded)


def test_what_the_main_verbs_add_to_the_import_of_torch_is_under_a_second() -> None:
    """The milliseconds that our own modules take, nothing below them: with them torch is imported, and without native code there is nothing slow in ours."""
    loaded = imported("import rarefy; rarefy.prune; rarefy.load; rarefy.perplexity")
    ours = {name: own for name, own in loaded.items() if name.split(".")[0] == "rarefy"}
    assert "torch" in loaded and "transformers" not in loaded
    assert len(ours) < 120, f"{len(ours)} modules of ours are imported"
    best = sorted(ours.values())
    assert sum(best) - best[-1] < 1000, f"{sum(best):.0f} ms; the slowest are {sorted(ours, key=ours.get)[-5:]}"  # one pause of a loaded machine is forgiven


def test_the_command_line_starts_without_what_only_some_verbs_need() -> None:
    loaded = imported("import rarefy.cli.verbs")
    assert "typer" in loaded and not {"transformers", "sklearn", "scipy", "gguf", "lm_eval", "llama_cpp", "peft"} & set(loaded)
