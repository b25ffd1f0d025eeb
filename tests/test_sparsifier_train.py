"""`train`: exact density, a kill and a resume give the same bytes, files whole, other runs refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from rarefy.core.errors import BadFile, BadInput, Refused
from rarefy.tasks.digits import Digits
from rarefy.weights.rewiring.rigl import RIGL
from rarefy.weights.rewiring.set import SET_RECIPE
from rarefy.weights.schedules.cubic import GRADUAL_MAGNITUDE
from rarefy.weights.schedules.static import STATIC
from rarefy.weights.train import train

pytest.importorskip("sklearn")
TASK = Digits(width=16, rows=8)
ADAMW = lambda p: torch.optim.AdamW(p, 1e-2)  # noqa: E731


class Stop(Exception):
    pass


def stop_at(n):
    def progress(step, steps):
        if step == n:
            raise Stop

    return progress


@pytest.mark.parametrize("optimizer", [None, ADAMW])
@pytest.mark.parametrize("recipe", [RIGL, SET_RECIPE, GRADUAL_MAGNITUDE, STATIC], ids=lambda r: r.name)
def test_a_stopped_run_ends_in_the_same_bytes(tmp_path, recipe, optimizer):
    how = {"density": 0.2, "steps": 40, "save_every": 7} | ({"optimizer": optimizer} if optimizer else {})
    record = train(TASK, recipe, checkpoint_dir=tmp_path / "a", **how)
    with pytest.raises(Stop):
        train(TASK, recipe, checkpoint_dir=tmp_path / "b", progress=stop_at(25), **how)
    assert not (tmp_path / "b" / "model.safetensors").exists()
    assert train(TASK, recipe, checkpoint_dir=tmp_path / "b", **how) == record
    for file in ("model.safetensors", "record.json", "checkpoint.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    total = sum(torch.Size(s["shape"]).numel() for s in record["sites"])
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert set(tensors) == set(TASK.model(0).state_dict())
    assert [int((tensors[s["key"]] != 0).sum()) for s in record["sites"]] == [s["nnz"] for s in record["sites"]]
    # A weight that was just grown may still be exactly zero, so RigL and SET can store fewer than they may.
    assert record["density"] <= round(0.2 * total) / total
    if recipe in (GRADUAL_MAGNITUDE, STATIC):
        assert record["density"] == round(0.2 * total) / total
    assert json.loads((tmp_path / "a" / "record.json").read_text()) == record


def test_sigkill_then_resume(tmp_path):
    code = (
        "import sys, time\nimport torch; torch.set_num_threads(1)\n"
        "from rarefy.tasks.digits import Digits\nfrom rarefy.weights.train import train\nfrom rarefy.weights.rewiring.rigl import RIGL\n"
        "train(Digits(width=16, rows=8), RIGL, density=0.2, steps=40, save_every=5, checkpoint_dir=sys.argv[1], progress=lambda s, n: time.sleep(0.05))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "b")])
    limit = time.monotonic() + 60
    while not (tmp_path / "b" / "checkpoint.safetensors").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "b" / "model.safetensors").exists()
    how = {"density": 0.2, "steps": 40, "save_every": 5}
    assert train(TASK, RIGL, checkpoint_dir=tmp_path / "b", **how) == train(TASK, RIGL, checkpoint_dir=tmp_path / "a", **how)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_what_is_wrong_is_said(tmp_path):
    train(TASK, STATIC, density=0.5, steps=2, checkpoint_dir=tmp_path)
    with pytest.raises(Refused, match="another checkpoint_dir"):
        train(TASK, STATIC, density=0.4, steps=2, checkpoint_dir=tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"nonsense")
    with pytest.raises(BadFile, match="resume=False"):
        train(TASK, STATIC, density=0.5, steps=2, checkpoint_dir=tmp_path)
    with pytest.raises(BadInput, match=r"density 1\.5"):
        train(TASK, STATIC, density=1.5, steps=2)
