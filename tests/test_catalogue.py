"""The catalogue: one row per paper, levels only from verdicts whose sources are unchanged, staleness noticed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rarefy import catalogue
from rarefy.core.discover import papers

ROOT = Path(__file__).parent.parent
SLUG = "lamp"


@pytest.fixture
def evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that makes {kind: verdict} all there is known about one paper, and returns its row."""

    def given(verdicts: dict[str, str], sources: list[str] | None = None, digest: str | None = None) -> dict[str, Any]:
        files = sources or [str(p.relative_to(ROOT)) for p in catalogue.sources_of(SLUG)]
        fresh = digest or (catalogue.digest([ROOT / f for f in files]) if sources is None else "0")
        rows = [{"name": "check", "kind": kind, "verdict": verdict, "sources": files, "digest": fresh} for kind, verdict in verdicts.items()]
        (tmp_path / "evidence.json").write_text(json.dumps({SLUG: rows}))
        monkeypatch.setattr(catalogue, "EVIDENCE", tmp_path / "evidence.json")
        catalogue._evidence.cache_clear()
        return next(r for r in catalogue.generate() if r["slug"] == SLUG)

    yield given
    catalogue._evidence.cache_clear()


def test_every_paper_has_one_row_in_order() -> None:
    rows = catalogue.generate()
    assert [r["id"] for r in rows] == [f"P{i:03d}" for i in range(1, 173)]
    assert len({r["slug"] for r in rows}) == 172
    assert all(r["title"] and r["field"] and r["composition"] for r in rows)


def test_status_follows_objects_and_level_and_missing_means_no_object() -> None:
    for row in catalogue.generate():
        assert (row["status"] == "missing") == (row["slug"] not in papers()) == (not row["objects"])
        assert (row["status"] == "working") == (bool(row["objects"]) and row["evidence"]["level"] >= 2)


def test_every_slug_in_the_code_is_a_row_or_a_baseline_once() -> None:
    listed, extra = [r["slug"] for r in catalogue.generate()], [r["slug"] for r in catalogue.baselines()]
    assert set(papers()) <= {*listed, *extra}
    assert not set(listed) & set(extra)


@pytest.mark.parametrize(
    ("verdicts", "level", "status"),
    [
        ({}, 0, "partial"),
        ({"contract": "pass"}, 1, "partial"),
        ({"method": "pass"}, 0, "partial"),
        ({"contract": "pass", "twin": "pass"}, 1, "partial"),
        ({"method": "pass", "twin": "pass"}, 2, "working"),
        ({"method": "pass", "twin": "pass", "oracle": "pass"}, 3, "working"),
        ({"method": "pass", "twin": "fail"}, 0, "partial"),
        ({"method": "pass", "twin": "pass", "oracle": "fail"}, 0, "partial"),
    ],
)
def test_the_level_is_what_the_verdicts_give(evidence: Any, verdicts: dict[str, str], level: int, status: str) -> None:
    row = evidence(verdicts)
    assert (row["evidence"]["level"], row["status"]) == (level, status)


@pytest.mark.parametrize("sources", [["rarefy/catalogue.py"], ["tests/a_test_that_was_deleted.py"]], ids=["changed", "deleted"])
def test_a_verdict_whose_source_changed_or_went_away_is_stale(evidence: Any, sources: list[str]) -> None:
    row = evidence({"method": "pass", "twin": "pass"}, sources)
    assert {c["verdict"] for c in row["evidence"]["checks"]} == {"stale"}
    assert (row["evidence"]["level"], row["status"]) == (0, "partial")


def test_check_names_the_rows_that_differ_and_what_to_run(evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "CATALOGUE", tmp_path / "catalogue.json")
    evidence({"method": "pass", "twin": "pass"})
    catalogue.write()
    catalogue.check()
    evidence({"method": "fail", "twin": "pass"})
    with pytest.raises(catalogue.Stale, match=f"differs in {SLUG}.*run make catalogue") as refused:
        catalogue.check()
    assert refused.value.exit_code == 1


@pytest.mark.parametrize(("slug", "file"), [("imp", "weights/rewind.py"), ("gradual-magnitude", "weights/schedules/cubic.py"), ("switch", "experts/overflow/capacity.py")])
def test_the_sources_of_a_row_hold_what_makes_its_phases_and_what_its_parts_are(slug: str, file: str) -> None:
    sources = catalogue.sources_of(slug)
    assert ROOT / "rarefy" / file in sources and all(ROOT / "rarefy" in source.parents for source in sources)
