"""Every packed folder that a release wrote loads for ever: the same values, the same gates, layouts and widths, and the same bytes when it is saved again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rarefy.core.attach import gated
from rarefy.hub.load import load
from rarefy.hub.packed import Packed, PackedEmbedding
from rarefy.surgery.narrow import edits

pytest.importorskip("transformers")
GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(folder.relative_to(GOLDEN) for folder in GOLDEN.glob("[0-9]*/*") if folder.is_dir())
IDS = torch.arange(12).view(2, 6)


def test_the_release_left_its_folders() -> None:
    assert {str(folder) for folder in FOLDERS} >= {"0.1.0/embeddings", "0.1.0/gates", "0.1.0/int4", "0.1.0/narrow"}


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_golden_folder_computes_what_it_did(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_NATIVE", "off")  # native kernels sum in another order and round x to 8 bits for int8 and int4
    expected = load_file(GOLDEN / folder / "expected" / "values.safetensors")["logits"]
    with torch.no_grad():
        logits = load(GOLDEN / folder / "model").model(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_golden_folder_is_what_its_plan_says(folder: Path, tmp_path: Path) -> None:
    model, plan = load(GOLDEN / folder / "model").model, json.loads((GOLDEN / folder / "model" / "config.json").read_text())["quantization_config"]
    packed = {path: module for path, module in model.named_modules() if isinstance(module, Packed)}
    assert packed and {path: module.layer.layout for path, module in packed.items()} == {path: entry["layout"] for path, entry in plan["layers"].items()}
    assert {place: type(gate).name for place, gate in gated(model).items()} == {place: entry["gate"] for place, entry in plan["gates"].items()}
    assert [(edit.width, edit.kept) for edit in edits(model)] == [(edit["from"], edit["to"]) for edit in plan["edits"]]
    assert any(isinstance(module, PackedEmbedding) for module in packed.values()) == ("model.embed_tokens" in plan["layers"])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (GOLDEN / folder / "model" / "model.safetensors").read_bytes()
