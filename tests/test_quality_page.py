"""The page of healing and rounding: fresh, and saying no more than the intervals carry; a verdict reaches every paper that it speaks of."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from replications import page, run


def figures(low, high, seeds=(0,)):
    pair = {"a": "spp", "b": "lors", "a_over_b": {"value": (low + high) / 2, "interval": [low, high]}}
    return {"pairs": [pair], "seeds": list(seeds), "healed": [{"method": "spp", "each_seed": [30.0, 31.0]}]}


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.2, -0.1, "spp is lower than lors: -15.0% (-20.0% to -10.0%)"),
        (0.25, 1.0, "lors is lower than spp: -38.5% (-50.0% to -20.0%)"),
        (-0.1, 0.1, "not told apart: spp and lors"),
        (0.0, 0.1, "not told apart: spp and lors"),
    ],
)
def test_an_order_is_said_only_where_its_interval_leaves_zero_out(low, high, said):
    lines = list(page._pairs(figures(low, high)))
    assert [line for line in lines if line.startswith("- ")] == [f"- {said}"]


def test_a_single_seed_is_called_one():
    assert "there is one" in list(page._pairs(figures(-0.2, -0.1)))[-1]
    assert "spp 30.00, 31.00" in list(page._pairs(figures(-0.2, -0.1, (0, 1))))[-1]


@pytest.mark.parametrize(("high", "value", "verdict"), [(0.04, 0.03, "yes, with the whole interval"), (0.06, 0.03, "yes, not with the whole interval"), (0.09, 0.06, "no")])
def test_a_budget_is_kept_by_the_interval_or_by_the_figure_alone(high, value, verdict):
    assert page._verdict({"value": value, "interval": [0.0, high]}, 0.05) == verdict


def test_the_page_is_that_of_the_results(tmp_path, monkeypatch):
    assert page.PAGE.read_text() == page.written()
    monkeypatch.setattr(page, "PAGE", tmp_path / "quality.md")
    (tmp_path / "quality.md").write_text(page.written().replace("zeros lost", "zeros kept"))
    monkeypatch.setattr("sys.argv", ["page", "--check"])
    with pytest.raises(SystemExit, match="not what the committed results say"):
        page.main()


def test_a_verdict_is_recorded_at_every_paper_and_once(tmp_path, monkeypatch):
    evidence = tmp_path / "evidence.json"
    evidence.write_text(json.dumps({"spp": [{"name": "a check", "kind": "method"}]}))
    monkeypatch.setattr(run.catalogue, "EVIDENCE", evidence)
    module = SimpleNamespace(SLUG=("spp", "lors"), NAME="what is claimed", SOURCES=())
    for verdict in ("did not reproduce", "pass"):
        run.record("run", module, {"verdict": verdict, "digest": "0"})
    found = json.loads(evidence.read_text())
    assert [c["name"] for c in found["spp"]] == ["a check", "what is claimed"]
    assert [(c["kind"], c["verdict"]) for c in found["lors"]] == [("replication", "pass")]
    assert run.slugs(SimpleNamespace(SLUG=None)) == () and run.slugs(SimpleNamespace(SLUG="spp")) == ("spp",)
