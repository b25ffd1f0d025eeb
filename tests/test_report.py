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


def test_a_folder_without_a_record_and_a_broken_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no prune\.json"):
        report(tmp_path)
    for broken in ("{", "{}", '{"sites": 3}'):
        (tmp_path / "prune.json").write_text(broken)
        with pytest.raises(BadFile, match="it is not a record of prune"):
            report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: the page is not laid out")
def test_at_phone_width_the_page_does_not_scroll_sideways(tmp_path: Path) -> None:
    (tmp_path / "prune.json").write_text(json.dumps(record()))
    source = write_report(tmp_path).read_text().replace("'", "&#39;")
    probe = "<script>onload=()=>{const d=document.querySelector('iframe').contentDocument;document.body.dataset.over=d.documentElement.scrollWidth-d.documentElement.clientWidth;document.body.dataset.bars=d.querySelectorAll('rect').length}</script>"
    (tmp_path / "phone.html").write_text(f"<!doctype html><meta charset=utf-8>{probe}<body><iframe style='width:375px;height:900px;border:0' srcdoc='{source}'></iframe>")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "phone.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = dict(re.findall(r'data-(over|bars)="(\d+)"', dom))
    assert found == {"over": "0", "bars": "9"}
