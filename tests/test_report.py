"""The report page: the record's figures, nothing from outside, hostile names escaped, readable at phone width."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rarefy.core.errors import BadFile, BadInput
from rarefy.probes.report import page, report, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def record(**more: Any) -> dict[str, Any]:
    sites = [
        {"name": f"layers.{i}.up.weight", "shape": [4, 8], "kept": 8 * (i + 1), "density": 0.25 * (i + 1), "error_mask_only": 0.4 / (i + 1), "error": 0.2 / (i + 1)}
        for i in range(3)
    ]
    return {"model": "tiny", "recipe": "r", "pattern": "p", "allocation": "a", "density_requested": 0.5, "density": 0.5, "mode": "cascade", "seed": 0, "sites": sites, **more}


def test_the_page_has_the_figures_of_the_record() -> None:
    text = page(record(), 1_500_000)
    assert "48 weights kept in 3 matrices (50.00%); 1.5 MB on disk" in text
    for cell in ("layers.1.up.weight", "4 × 8", "0.7500", "0.4000", "0.0667"):
        assert f"<td>{cell}</td>" in text
    heights = [float(h) for h in re.findall(r"<rect class=a [^>]*height=([\d.]+)>", text)]
    assert heights[:3] == pytest.approx([160 / 3, 320 / 3, 160], abs=0.01)  # density, scaled to the largest
    assert heights[3:] == pytest.approx([80, 40, 80 / 3], abs=0.01)  # error, on the scale of the mask alone


def test_the_page_is_self_contained_and_has_no_script() -> None:
    text = page(record(), 1)
    assert not re.search(r"<script|<link|<img|\bsrc=|\bhref=|url\(|@import|https?:", text)
    assert "prefers-color-scheme:dark" in text


def test_hostile_names_are_escaped() -> None:
    evil = record(model="<script>alert(1)</script>")
    evil["sites"][0]["name"] = "'><img src=x>"
    text = page(evil, 1)
    assert "<script" not in text
    assert "<img" not in text


def test_a_search_shows_its_loss_interval_and_tries() -> None:
    tried = [{"recipe": "r", "allocation": "a", "density": 0.5, "loss": 0.04, "interval": [0.03, 0.06], "ok": True}]
    text = page(record(optimize={"max_loss": 0.05, "loss": 0.04, "interval": [0.03, 0.06], "tried": tried}), 1)
    assert "rose by 4.00% (95%: 3.00% to 6.00%); the budget was 5.0%" in text
    assert "<td>3.00% to 6.00%</td><td>yes</td>" in text


def test_a_model_kept_dense_has_a_page() -> None:
    assert "The dense model was kept" in page(record(sites=[]), 1)


def packed_record(**more: Any) -> dict[str, Any]:
    sites = [
        {"name": "a.weight", "density": 0.5, "bytes_dense": 4000, "bytes": 2100, "layout": "int8", "error": 0.125, "dense_because": None},
        {"name": "b.weight", "density": 1.0, "bytes_dense": 2000, "bytes": 2000, "layout": None, "error": 0.0, "dense_because": "packed it would be no smaller"},
    ]
    gates = [{"name": "a", "gate": "topk", "settings": {"density": 0.25}}]
    ledger = {"tokens": 256, "macs": 10.0, "macs_executed": 7.5, "mac_density": 0.75, "matrices": []}
    gating = {"gating": "topk at a", "density_requested": 0.25, "density": 0.26, "gates": [{"name": "a", "gate": "topk", "density_set": 0.25, "density": 0.2617}], "ledger": ledger}
    edits = [{"edit": "narrow", "rows": ["up"], "columns": ["down"], "from": 9, "to": 5}]
    return {"layout": "int8", "bytes_dense": 6000, "bytes_stored": 4100, "packed": 1, "gates": gates, "edits": edits, "sites": sites, "gating": gating, **more}


def healed_record(**more: Any) -> dict[str, Any]:
    scores = {f"perplexity_{when}": {"value": value, "interval": [value - 1, value + 1]} for when, value in (("before", 20.0), ("after", 15.0))}
    losses = {f"loss_{when}": {"value": value, "interval": None} for when, value in (("before", 3.0), ("after", 2.7))}
    zeros = {"before": 1000, "after": 1000, "lost": 0}
    return {"model": "half", "method": "spp", "tokens": 8192, "steps": 3, "zeros": zeros, "matrices": 14, "train_loss": [3.0, 2.0, 2.5], **scores, **losses, **more}


def write(folder: Path, name: str, found: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / name).write_text(json.dumps(found))
    return write_report(folder).read_text()


def test_a_packed_folder_has_a_page_of_bytes_layouts_and_gates(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "model.safetensors").write_bytes(b"0" * 5000)
    (tmp_path / "p" / "pack.json").write_text(json.dumps(packed_record()))
    text = write_report(tmp_path / "p").read_text()
    assert "1 of 2 matrices are packed: 6.0 kB became 4.1 kB (68.3%); 5.0 kB on disk with everything else. Layouts: int8 1, dense 1." in text
    assert "26.00% of the gated activations stay, 25.00% asked, and a token takes 75.00% of the matrices&#x27; multiply-adds, measured on 256 held-out tokens" in text
    for row in (("a", "topk", "0.2500", "0.2617"), ("up", "9", "5"), ("b.weight", "dense", "1.0000", "2.0 kB", "2.0 kB", "0.0000", "packed it would be no smaller")):
        assert "".join(f"<td>{cell}</td>" for cell in row) in text
    dense, stored = ([float(h) for h in re.findall(rf"<rect class={css} [^>]*height=([\d.]+)><title>[ab]\.weight: [\d.]+ kB", text)] for css in "ba")
    assert (dense, stored) == ([160.0, 80.0], [84.0, 80.0])
    plain = write(tmp_path / "q", "pack.json", packed_record(gates=[], edits=[], gating=None, sites=[{**s, "error": 0.0} for s in packed_record()["sites"]]))
    assert "Gates" not in plain and "Narrower" not in plain and "Relative error of the stored" not in plain


def test_a_healed_folder_has_a_page_of_what_healing_gave(tmp_path: Path) -> None:
    text = write(tmp_path / "h", "heal.json", healed_record())
    assert "Perplexity went from 20.000 to 15.000 (-25.00%) in 3 steps over 8,192 tokens; 0 of 1,000 zeros in 14 matrices were lost" in text
    assert "<td>before</td><td>20.0000</td><td>19.0000 to 21.0000</td><td>3.00000</td>" in text
    assert re.findall(r"<polyline class=line points='([^']*)'", text) == ["0.00,4.00 450.00,156.00 900.00,80.00"]
    marks = [float(x) for x in re.findall(r"<rect class=[ab] x=([\d.]+) [^>]*width=4 ", text)]
    assert marks == pytest.approx([20 + 860 * 6 / 7 - 2, 20 + 860 * 1 / 7 - 2], abs=0.01)  # 20 and 15 on a scale from 14 to 21
    assert "no interval" not in write(tmp_path / "i", "heal.json", healed_record(perplexity_after={"value": 15.0, "interval": None}, train_loss=[1.0]))


def test_an_unpacked_folder_and_matrices_that_keep_nothing_are_said(tmp_path: Path) -> None:
    site = {"name": "a.weight", "layout": "bitmask", "shape": [4, 8], "bytes": 80, "density": 0.5, "bytes_dense": 128}
    gate = {"name": "a", "gate": "topk", "settings": {}}
    text = write(tmp_path / "u", "unpack.json", {"model": "m", "bytes_stored": 80, "bytes_dense": 128, "sites": [site], "dropped_gates": [gate], "widened": []})
    assert "1 matrix made dense again" in text and "<p class=warn>Left out: 1 activation gate that the packed folder had." in text
    assert "<p class=warn>No weight is kept in layers.0.up.weight: it computes zeros." in page(record(emptied=["layers.0.up.weight"]), 1)
    assert "class=warn" not in page(record(), 1)


def test_errors_of_the_weights_alone_are_called_so() -> None:
    alone = [{**site, "error_on": "weight"} for site in record()["sites"]]
    assert "Relative error of the weights, matrix by matrix" in page(record(sites=alone), 1)
    assert "Relative error of the output, matrix by matrix" in page(record(), 1)


@pytest.mark.parametrize("name", ["pack.json", "heal.json", "unpack.json"])
def test_a_broken_record_of_any_verb_is_one_sentence(tmp_path: Path, name: str) -> None:
    for broken in ("{", "[]", "{}", '{"sites": 3, "model": 1}', "\xff"):
        (tmp_path / name).write_text(broken, encoding="latin-1")
        with pytest.raises(BadFile, match=f"it is not a record of {name.removesuffix('.json')}"):
            report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_without_a_record_and_a_broken_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no pack\.json, unpack\.json, heal\.json or prune\.json"):
        report(tmp_path)
    for broken in ("{", "{}", '{"sites": 3}'):
        (tmp_path / "prune.json").write_text(broken)
        with pytest.raises(BadFile, match="it is not a record of prune"):
            report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: the page is not laid out")
@pytest.mark.parametrize(
    ("name", "found", "bars"),
    [("prune.json", record(model="a-folder-name-without-a-space" * 3), "9"), ("pack.json", packed_record(), "8"), ("heal.json", healed_record(), "4")],
    ids=["prune", "pack", "heal"],
)
def test_at_phone_width_the_page_does_not_scroll_sideways(tmp_path: Path, name: str, found: dict[str, Any], bars: str) -> None:
    (tmp_path / name).write_text(json.dumps(found))
    source = write_report(tmp_path).read_text().replace("'", "&#39;")
    probe = "<script>onload=()=>{const d=document.querySelector('iframe').contentDocument;document.body.dataset.over=d.documentElement.scrollWidth-d.documentElement.clientWidth;document.body.dataset.bars=d.querySelectorAll('rect').length}</script>"
    (tmp_path / "phone.html").write_text(f"<!doctype html><meta charset=utf-8>{probe}<body><iframe style='width:375px;height:900px;border:0' srcdoc='{source}'></iframe>")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "phone.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert dict(re.findall(r'data-(over|bars)="(\d+)"', dom)) == {"over": "0", "bars": bars}
