"""The expert store: the same bits for every cache size, counts by hand, and files it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rarefy.core.errors import BadFile, BadInput
from rarefy.core.records import Routing
from rarefy.experts.banks.glu import GLU
from rarefy.experts.dispatch import dispatch, gather, loop
from rarefy.runtime.store import ExpertStore


def saved(path: Path) -> GLU:
    torch.manual_seed(0)
    bank = GLU(4, 6, 5)
    save_file({f"moe.{name}": p.detach() for name, p in bank.named_parameters()}, path / "experts.safetensors")
    return bank


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@torch.no_grad()
def test_outputs_are_the_same_bits_for_any_size(tmp_path: Path, size: int) -> None:
    bank = saved(tmp_path)
    store = ExpertStore(tmp_path / "experts.safetensors", size, prefix="moe.")
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        x, expert = torch.randn(9, 6, generator=g), torch.randint(0, 5, (18,), generator=g)
        routing = Routing(expert, torch.rand(18, generator=g), 9, 4, 2)
        assert torch.equal(dispatch(x, routing, store, backend=loop), dispatch(x, routing, bank, backend=loop))
        torch.testing.assert_close(dispatch(x, routing, store, backend=gather), dispatch(x, routing, bank, backend=gather))
        assert len(store.kept) <= size


def test_the_least_recently_used_expert_leaves(tmp_path: Path) -> None:
    saved(tmp_path)
    store = ExpertStore(tmp_path / "experts.safetensors", 2, prefix="moe.")
    for expert in (0, 1, 0, 2, 0, 1):
        store.fetch(expert)
    assert store.kept == (0, 1)
    assert (store.hits, store.misses) == (2, 4)


def test_bad_files_and_sizes_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "experts.safetensors"
    for size in (0, 5):
        with pytest.raises(BadInput):
            ExpertStore(file, size, prefix="moe.")
    with pytest.raises(BadFile):
        ExpertStore(file, 1)
    with pytest.raises(BadFile):
        ExpertStore(tmp_path / "absent.safetensors", 1)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(BadFile):
        ExpertStore(file, 1, prefix="moe.")
    save_file({"gate_up_proj": torch.zeros(2, 4, 3), "down_proj": torch.zeros(2, 4, 3)}, file)
    with pytest.raises(BadFile):
        ExpertStore(file, 1)
