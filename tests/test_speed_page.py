"""The page of speed: made from what was measured, fresh, and honest about what was missed."""

from __future__ import annotations

import json

import pytest

from benchmarks import page
from benchmarks.page import TARGETS, Target, _free, _targets, figure, verdicts

RESULTS = page.HERE / "results"


def measured(ratio, **changes):
    row = {"op": "linear", "layout": "csr", "pattern": "matrix", "density": 0.1001, "batch": 1, "peer": "torch-dense", "ratio": ratio}
    return {**row, "ratio_min": ratio, "ratio_max": ratio, **changes}


def test_a_target_takes_its_best_row_and_no_wrong_one():
    target = Target(4, "", {"layout": "csr", "density": 0.1, "peer": "torch-dense"}, 2.0, 3.0)
    rows = [measured(1.0), measured(2.5), measured(None), measured(9.0, density=0.5), measured(9.0, peer="own-dense")]
    assert target.row(rows)["ratio"] == 2.5 and target.row(rows[2:]) is None


@pytest.mark.parametrize(("ratio", "words"), [(1.0, "**missed**, 50% of it"), (2.0, "| met |"), (3.0, "goal met"), (None, "not measured")])
def test_a_missed_target_is_said(monkeypatch, ratio, words):
    monkeypatch.setattr(page, "TARGETS", (Target(4, "what", {"layout": "csr"}, 2.0, 3.0),))
    assert words in "\n".join(_targets({"rows": [measured(ratio)], "machine": {"float32_gflops": 1}}, "title"))


def test_every_target_was_measured():
    rows = json.loads((RESULTS / "products.json").read_text())["rows"]
    assert [t.what for t in TARGETS if t.row(rows) is None] == []
    assert all(row["warning"] is None or "result is wrong" not in row["warning"] for row in rows)


def test_a_routed_layer_meets_its_target_or_is_said_to_miss_it():
    row = {"op": "experts", "experts": 64, "k": 8, "width": 512, "inner": 512, "peer": "transformers-eager", "ratio_min": 1.0, "ratio_max": 20.0}
    row |= {"ours_us": 10.0, "peer_us": 20.0, "gb_per_s": 5.0, "roofline": 0.5, "max_abs_err": 1e-7}
    rows = [{**row, "tokens": 1, "ratio": 4.5}, {**row, "tokens": 16, "ratio": 6.0}, {**row, "tokens": 128, "ratio": None}]
    text = "\n".join(_targets({"rows": rows, "machine": {"float32_gflops": 1}}, "title", page.EXPERTS_TARGETS))
    assert text.count("**missed**, 50% of it") == 1 and text.count("goal met") == 1 and text.count("not measured") == 1
    assert [line.split("|")[4].strip() for line in list(page._layers(rows))[2:5]] == ["4.50", "6.00", "wrong"]


def test_labels_lie_on_nothing():
    taken = [(90.0, 90.0, 20.0, 20.0)]
    for _ in range(5):
        left, up = _free(100, 100, 10, 60, taken, 0, 400)
        assert not any(left < b[0] + b[2] and b[0] < left + 60 and up < b[1] + b[3] and b[1] < up + 13 for b in taken)
        taken.append((left, up, 60, 13))


def test_page_figure_and_first_page_are_those_of_the_results():
    load = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("products", "products-avx2", "quality")}
    decode = [row for file in sorted(RESULTS.glob("decode-*.json")) for row in json.loads(file.read_text())["rows"]]
    experts = json.loads((RESULTS / "experts.json").read_text()) if (RESULTS / "experts.json").is_file() else None
    assert (page.DOCS / "speed.md").read_text() == page.page(load["products"], load["products-avx2"], decode, load["quality"], experts)
    assert (page.DOCS / "frontier.svg").read_text() == figure(decode)
    assert verdicts(load["products"], decode, load["quality"]) in (page.HERE.parent / "README.md").read_text()
