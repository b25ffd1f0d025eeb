"""What is written loads in plain transformers, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy.core.errors import Refused
from rarefy.hub.export import save_dense

transformers = pytest.importorskip("transformers")
RECORD = {"model": "tiny", "recipe": "some", "pattern": "any", "density": 0.5, "sites": {"a": 1}}


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[::2] = 0
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_transformers_loads_it_bit_exact(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    model = llama(tied).to(dtype)
    save_dense(model, None, tmp_path / "out", record=RECORD)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == dtype
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    assert (again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()) == tied
    assert int((again.model.layers[0].mlp.up_proj.weight == 0).sum()) == 12 * 16


def test_card_and_record_say_what_was_done(tmp_path: Path) -> None:
    out = save_dense(llama(True), None, tmp_path / "out", record=RECORD, timings={"seconds": 1.0})
    assert json.loads((out / "prune.json").read_text()) == {**RECORD, "out": "out"}
    assert "50.0000%" in (out / "README.md").read_text()
    assert json.loads((out / "timings.json").read_text()) == {"seconds": 1.0}


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    save_dense(llama(True), None, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(Refused, match="out exists and is not empty"):
        save_dense(llama(True), None, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    save_dense(llama(True), None, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "notes.txt").exists()


def test_a_full_disk_leaves_the_old_model_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_dense(llama(True), None, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    model = llama(False)

    def full(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(Refused, match="disk is full"):
        save_dense(model, None, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_another_run_finished_meanwhile_is_kept(tmp_path: Path) -> None:
    def slow(folder: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("theirs")

    with pytest.raises(Refused, match="out exists and is not empty"):
        save_dense(llama(True), None, tmp_path / "out", write=slow)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "theirs"
