"""The report page: the record's figures, nothing from outside, hostile names escaped, readable at phone width, in the dark and aloud."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rarefy.core.errors import BadFile, BadInput
from rarefy.probes.pages import pruned
from rarefy.probes.pages.page import Facts
from rarefy.probes.report import report, write_report


def page(found: dict[str, Any], size: int) -> str:
    return pruned.page(found, Facts(size)).html()


def row(*cells: str) -> str:
    """A row of a table, whatever side its cells keep to."""
    return f"<tr><th scope=row>{cells[0]}</th>" + "".join(rf"<td( class=t)?>{re.escape(cell)}</td>" for cell in cells[1:]) + "</tr>"


def record(**more: Any) -> dict[str, Any]:
    sites = [
        {"name": f"layers.{i}.up.weight", "shape": [4, 8], "kept": 8 * (i + 1), "density": 0.25 * (i + 1), "error_mask_only": 0.4 / (i + 1), "error": 0.2 / (i + 1)}
        for i in range(3)
    ]
    return {"model": "tiny", "recipe": "r", "pattern": "p", "allocation": "a", "density_requested": 0.5, "density": 0.5, "mode": "cascade", "seed": 0, "sites": sites, **more}


def test_the_page_has_the_figures_of_the_record() -> None:
    text = page(record(), 1_500_000)
    assert "48 weights kept in 3 matrices (50.00%); 1.5 MB on disk" in text
    assert re.search(row("up", "4 × 8", "24", "0.7500", "0.1333", "0.0667"), text)
    assert re.search(row("layers.1", "1", "32 weights", "16", "0.5000", "0.2000 (mean)", "0.1000 (mean)"), text)
    assert re.search(row("all", "3", "96 weights", "48", "0.5000", "0.2444 (mean)", "0.1222 (mean)"), text)
    assert heights(text, "a") == pytest.approx([100 / 3, 200 / 3, 100, 50, 25, 50 / 3], abs=0.01)  # density, then error on the scale of the mask alone
    assert heights(text, "b") == pytest.approx([100, 50, 100 / 3], abs=0.01)


def heights(text: str, css: str, of: str = "") -> list[float]:
    """Bars in percent of their figure."""
    return [float(h) for h in re.findall(rf"<rect class={css} [^>%]*height=([\d.]+)><title>[^<]*{of}", text)]


def test_the_page_is_self_contained_and_has_no_script() -> None:
    text = page(record(), 1)
    assert not re.search(r"<script|<link|<img|\bsrc=|\bhref=[^#]|url\(|@import|https?:", text)
    assert "prefers-color-scheme:dark" in text


def test_hostile_names_are_escaped() -> None:
    evil = record(model="<script>alert(1)</script>")
    evil["sites"][0]["name"] = "'><img src=x>"
    text = page(evil, 1)
    assert "<script" not in text
    assert "<img" not in text


def test_a_search_shows_its_loss_interval_and_tries() -> None:
    tried = [{"recipe": "r", "allocation": "a", "density": 0.5, "loss": 0.04, "interval": [0.03, 0.06], "ok": True}]
    text = page(record(optimize={"max_loss": 0.05, "loss": 0.04, "interval": [0.03, 0.06], "chosen": {"recipe": "r", "allocation": "a", "density": 0.5}, "tried": tried}), 1)
    assert "rose by 4.00% (95%: 3.00% to 6.00%); the budget was 5.0%" in text
    assert re.search(row("1. r, a", "0.5", "4.00%", "3.00% to 6.00%", "yes"), text)
    assert "1 chosen (r, a, density 0.5): 0.5 density, loss 4.00%" in text


def test_a_model_kept_dense_has_a_page() -> None:
    assert "The dense model was kept" in page(record(sites=[]), 1)


def packed_record(**more: Any) -> dict[str, Any]:
    sites = [
        {"name": "a.weight", "density": 0.5, "bytes_dense": 4000, "bytes": 2100, "layout": "int8", "error": 0.125, "dense_because": None},
        {"name": "b.weight", "density": 1.0, "bytes_dense": 2000, "bytes": 2000, "layout": None, "error": 0.0, "dense_because": "packed it would be no smaller"},
    ]
    gates = [{"name": "a", "gate": "topk", "settings": {"density": 0.25}}]
    ledger = {"tokens": 256, "macs": 10.0, "macs_executed": 7.5, "mac_density": 0.75, "matrices": [{"name": "a", "density": 0.2617, "macs": 4.0, "macs_executed": 0.6}]}
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
    save_file({"unrelated": torch.zeros(1230)}, tmp_path / "p" / "model.safetensors")
    assert (tmp_path / "p" / "model.safetensors").stat().st_size == 5000
    (tmp_path / "p" / "pack.json").write_text(json.dumps(packed_record()))
    text = write_report(tmp_path / "p").read_text()
    assert "1 of 2 matrices are packed: 6.0 kB became 4.1 kB (68.3%); 5.0 kB on disk with everything else. Layouts: int8 1, dense 1." in text
    assert "26.00% of the gated activations stay, 25.00% asked, and a token takes 75.00% of the matrices&#x27; multiply-adds, measured on 256 held-out tokens" in text
    kept = ("1.0000", "2.0 kB", "2.0 kB", "0.0000")
    for cells in (("a", "topk", "0.2500", "0.2617"), ("up", "9", "5"), ("b", "dense", *kept, "-", "-", "packed it would be no smaller")):
        assert re.search(row(*cells), text), cells
    assert re.search(row("a", "int8", "0.5000", "4.0 kB", "2.1 kB", "0.1250", "0.2617", "0.1500", ""), text)
    assert re.search(row("together", "int8 1, dense 1", "0.6667", "6.0 kB", "4.1 kB", "0.0625 (mean)", "0.2617 (mean)", "0.1500", "1 dense"), text)
    assert (heights(text, "b", " kB"), heights(text, "a", " kB")) == ([100.0, 50.0], [52.5, 50.0])
    plain = write(tmp_path / "q", "pack.json", packed_record(gates=[], edits=[], gating=None, sites=[{**s, "error": 0.0} for s in packed_record()["sites"]]))
    assert "Gates" not in plain and "Narrower" not in plain and "Relative error of the stored" not in plain


def test_a_healed_folder_has_a_page_of_what_healing_gave(tmp_path: Path) -> None:
    text = write(tmp_path / "h", "heal.json", healed_record())
    assert "Perplexity went from 20.000 to 15.000 (-25.00%) in 3 steps over 8,192 tokens; 0 of 1,000 zeros in 14 matrices were lost" in text
    assert re.search(row("before", "20.0000", "19.0000 to 21.0000", "3.00000"), text)
    assert re.findall(r"<polyline class=line points='([^']*)'", text) == ["0.00,0.00 50.00,100.00 100.00,50.00"]
    marks = [float(x) for x in re.findall(r"<svg x=([\d.]+)% y=\d+><circle class=[ab] r=5", text)]
    assert marks == pytest.approx([100 * 6.42 / 7.84, 100 * 1.42 / 7.84], abs=0.01)  # 20 and 15 on a scale from 14 to 21 and 6% of room
    alone = write(tmp_path / "i", "heal.json", healed_record(perplexity_after={"value": 15.0, "interval": None}, train_loss=[1.0]))
    assert re.search(row("after", "15.0000", "-", "2.70000"), alone) and "Training loss" not in alone and "Training loss" in text


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


@pytest.mark.parametrize("name", ["optimize.json", "pack.json", "heal.json", "unpack.json"])
def test_a_broken_record_of_any_verb_is_one_sentence(tmp_path: Path, name: str) -> None:
    for broken in ("{", "[]", "{}", '{"sites": 3, "model": 1}', "\xff"):
        (tmp_path / name).write_text(broken, encoding="latin-1")
        with pytest.raises(BadFile, match=f"it is not a record of {name.removesuffix('.json')}"):
            report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_without_a_record_and_a_broken_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no optimize\.json, pack\.json, unpack\.json, heal\.json or prune\.json"):
        report(tmp_path)
    for broken in ("{", "{}", '{"sites": 3}'):
        (tmp_path / "prune.json").write_text(broken)
        with pytest.raises(BadFile, match="it is not a record of prune"):
            report(tmp_path)
    assert not (tmp_path / "report.html").exists()
