"""`pytest --record-evidence` writes the verdict of every marked test, with a hash of the sources it depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rarefy import catalogue

ROOT = Path(__file__).parent.parent
_seen: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-evidence", action="store_true", help="write the verdicts of marked tests to rarefy/data/evidence.json")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-evidence") and hasattr(config, "workerinput"):
        raise pytest.UsageError("--record-evidence: workers would overwrite one another's verdicts; run without -n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    mark = item.get_closest_marker("evidence")
    if mark is not None and (report.when == "call" or report.failed) and item.config.getoption("--record-evidence"):
        slug, name, kind = mark.kwargs["slug"], mark.kwargs["name"], mark.kwargs["kind"]
        sources = [*catalogue.sources_of(slug), Path(item.path)]
        rows = _seen.setdefault(slug, {})
        before = rows.get((name, kind), {"verdict": "pass"})
        verdict = "pass" if report.passed and before["verdict"] == "pass" else "fail"
        rows[name, kind] = {
            "name": name,
            "kind": kind,
            "verdict": verdict,
            "sources": sorted(str(s.relative_to(ROOT)) for s in sources),
            "digest": catalogue.digest(sources),
        }
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--record-evidence") and _seen:
        known = json.loads(catalogue.EVIDENCE.read_text()) if catalogue.EVIDENCE.is_file() else {}
        for slug, rows in _seen.items():
            replicated = [c for c in known.get(slug, []) if c["kind"] == "replication"]  # `make replicate` wrote them
            known[slug] = sorted([*rows.values(), *replicated], key=lambda c: (c["name"], c["kind"]))
        catalogue.EVIDENCE.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
