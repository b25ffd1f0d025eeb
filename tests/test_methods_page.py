"""docs/methods.md: every recipe and part is there, the same way; `rarefy catalogue --check` notices what is not fresh."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rarefy import catalogue
from rarefy.cli import methods_page
from rarefy.cli.main import main
from rarefy.core.discover import methods, recipes, train_recipes


@pytest.fixture(scope="module")
def page() -> str:
    return methods_page.generate()


def section(page: str, name: str) -> str:
    return re.split(r"\n##+ ", page.split(f"### `{name}`\n")[1])[0]


@pytest.mark.parametrize("name", [*recipes(), *train_recipes()])
def test_every_recipe_has_a_composition_and_an_equation_and_its_papers_evidence(page: str, name: str) -> None:
    found = section(page, name)
    assert found.count("- Composition: ") == 1
    assert "- Equation (" in found
    if name != "static":  # a recipe of parts: its own row is that of random pruning
        assert "- Source (" in found
    assert len(re.findall("- Paper: ", found)) == len(re.findall("- Evidence for ", found)) > 0


def test_the_baselines_state_where_they_differ(page: str) -> None:
    for name, recipe in {**recipes(), **train_recipes()}.items():
        for deviation in recipe.paper.deviations if recipe.paper else ():
            assert f"- Differs: {deviation}\n" in section(page, name)
    assert "`p_b = p + r_b - mean r`" in section(page, "owl")
    assert "allocation `ERK()`" in section(page, "rigl")
    assert "allocation `ER()`" in section(page, "set")


def test_every_part_of_every_role_is_listed(page: str) -> None:
    parts = page.split("## Parts, by role")[1]
    for role in methods_page.ROLES:
        listed = parts.split(f"### {role.__name__}\n")[1].split("\n### ")[0]
        assert re.findall(r"(?m)^- \*\*(.+?)\*\*: ", listed) == list(methods(role))


def test_check_covers_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(catalogue, "CATALOGUE", tmp_path / "catalogue.json")
    monkeypatch.setattr(methods_page, "PAGE", tmp_path / "methods.md")
    assert main(["catalogue", "--write", "--json"]) == 0
    assert main(["catalogue", "--check", "--json"]) == 0
    (tmp_path / "methods.md").write_text((tmp_path / "methods.md").read_text().replace("ERK()", "Uniform()", 1))
    capsys.readouterr()
    assert main(["catalogue", "--check"]) == 1
    assert "methods.md is not fresh: it is generated from code and evidence; run make catalogue" in capsys.readouterr().err
    (tmp_path / "methods.md").unlink()
    assert main(["catalogue", "--check"]) == 1


def test_an_installed_package_has_no_page_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods_page, "PAGE", tmp_path / "none" / "methods.md")
    methods_page.write()
    methods_page.check()
