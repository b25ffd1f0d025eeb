"""Weights streamed from their shards: the bytes of a prune in memory, with less memory than the model takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rarefy.core.discover import recipes
from rarefy.hub.export import save_dense
from rarefy.hub.shards import load_sharded
from rarefy.weights.checkpoint import Checkpoint
from rarefy.weights.prune import prune

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS}, {"input_ids": IDS.flip(0)}]
LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**LLAMA, "attention_bias": True}),
    "tied": ("Llama", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (family, options) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**options)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.add_(0.01 * torch.randn_like(parameter))  # biases and norms too
        made[name] = tmp_path_factory.mktemp(name)
        (model.bfloat16() if name == "tied" else model).save_pretrained(made[name], max_shard_size="20KB")
        assert len(list(made[name].glob("*.safetensors"))) > 2
    return made


def pruned(folder: Path, out: Path, recipe: str, streamed: bool, **options: Any) -> dict[str, Any]:
    checkpoint = Checkpoint(out.with_suffix(".partial"))
    if streamed:
        loaded, weights = load_sharded(folder)
        model, write = loaded.model, weights.write
        assert all(p.is_meta for p in model.parameters())
    else:
        model, weights, write = transformers.AutoModelForCausalLM.from_pretrained(folder), None, None
    record = prune(model, BATCHES, recipes()[recipe], density=0.5, checkpoint=checkpoint, weights=weights, **options)
    assert not streamed or all(p.is_meta for p in model.parameters())
    save_dense(model, None, out, record={**record, "model": ""}, write=write)
    return record


CASES = [
    ("llama", "sparsegpt", {"mode": "cascade"}),
    ("llama", "sparsegpt", {"mode": "parallel"}),
    ("llama", "magnitude", {"errors": False}),
    ("tied", "wanda", {"mode": "cascade"}),
    ("tied", "wanda", {"mode": "parallel"}),
    ("tied", "sparsegpt", {}),
    ("tied", "magnitude", {"include": ["*embed_tokens", "*up_proj"]}),
    ("llama", "sparsegpt", {"include": ["lm_head", "*up_proj"]}),
    ("gpt2", "sparsegpt", {}),
]


@pytest.mark.parametrize(("name", "recipe", "options"), CASES, ids=lambda v: str(v) if isinstance(v, str) else "-".join(map(str, v.values())))
def test_streamed_weights_end_as_the_bytes_of_a_prune_in_memory(folders: dict[str, Path], tmp_path: Path, name: str, recipe: str, options: dict[str, Any]) -> None:
    memory = pruned(folders[name], tmp_path / "a" / "out", recipe, False, **options)
    streamed = pruned(folders[name], tmp_path / "b" / "out", recipe, True, **options)
    assert {**memory, "model": ""} == {**streamed, "model": ""}
    assert 0.49 < memory["density"] < 0.51
    for file in ("model.safetensors", "prune.json", "config.json", "generation_config.json"):
        assert (tmp_path / "a" / "out" / file).read_bytes() == (tmp_path / "b" / "out" / file).read_bytes(), file
    folder = "out.partial"
    assert (tmp_path / "a" / folder / "key.json").read_bytes() == (tmp_path / "b" / folder / "key.json").read_bytes()
    groups = sorted(p.name for p in (tmp_path / "a" / folder).glob("*.safetensors"))
    assert len(groups) >= 3
    for group in groups:
        left, right = (load_file(tmp_path / side / folder / group) for side in "ab")
        assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
