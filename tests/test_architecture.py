"""Imports point one way; a method's name lives in its own file; nothing is unpickled."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import rarefy
from rarefy.core.discover import ROOMS, methods, papers, recipes, train_recipes
from rarefy.core.roles import Allocation, Criterion, Rewiring, Solver

ROOT = Path(__file__).parent.parent / "rarefy"
FILES = sorted(ROOT.rglob("*.py"))
ORDER = ("core", "kernels", "layouts", "weights experts activations", "surgery", "runtime distributed", "hub", "tasks probes", "search", "cli")
RANK = {room: level for level, rooms in enumerate(ORDER) for room in rooms.split()}
PARTS = {
    "__init__.py": len(ORDER),
    "__main__.py": len(ORDER),
    "catalogue.py": RANK["probes"],
    "testing": RANK["cli"],
    "data": -1,
}


def rank(path: Path) -> int:
    room = path.relative_to(ROOT).parts[0]
    return RANK.get(room, PARTS.get(room, 0))


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way_and_nothing_is_unpickled(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for name in imported(tree):
        assert name.split(".")[0] != "pickle" or "testing" in path.parts, f"{path} imports pickle"  # the contract suite copies parts by it
        parts = name.split(".")
        if parts[0] == "rarefy" and len(parts) > 1 and parts[1] in RANK:
            assert RANK[parts[1]] <= rank(path), f"{path.relative_to(ROOT)} imports {name}, which lies above it"


def test_no_package_hides_a_name_of_the_library() -> None:
    inside = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert not inside & set(rarefy.__all__), "importing it would put the module where the function was"
    assert not set(ROOMS) - inside, "a room that does not exist"
    assert not set(ROOMS) & set(rarefy.__all__)


def test_a_methods_slug_occurs_only_in_its_own_file() -> None:
    import inspect

    owners: dict[str, set[Path]] = {}
    for slug, objects in papers().items():
        owners[slug] = {Path(inspect.getfile(o)).resolve() for o in objects if inspect.isclass(o)}
    for kind in (Criterion, Allocation, Solver, Rewiring):
        for name, cls in methods(kind).items():
            owners.setdefault(name, set()).add(Path(inspect.getfile(cls)).resolve())
    defined = {r.name for r in (*recipes().values(), *train_recipes().values())}
    distinct = {s for s in {*owners, *defined} if s not in {"global", "uniform", "random", "gradient", "keep", "static", "set", "magnitude", "peer"}}
    uses: dict[str, set[Path]] = {}
    for path in FILES:
        if path.relative_to(ROOT).parts[0] in ("cli",):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in distinct:
                uses.setdefault(node.value, set()).add(path.resolve())
    assert {slug: files for slug, files in uses.items() if len(files - owners.get(slug, set())) > (slug not in owners or not owners[slug])} == {}


def test_every_part_has_a_docstring() -> None:
    bare = [f"{cls.__module__}.{cls.__name__}" for kind in (Criterion, Allocation, Solver, Rewiring) for cls in methods(kind).values() if not (cls.__doc__ or "").strip()]
    assert bare == []
