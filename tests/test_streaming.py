"""Weights streamed from their shards: the bytes of a prune in memory, with less memory than the model takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rarefy.cli.main import main
from rarefy.core.discover import recipes
from rarefy.core.errors import BadFile, BadInput, Refused
from rarefy.hub import shards
from rarefy.hub.export import save_dense
from rarefy.hub.shards import ShardedWeights, available_bytes, load_sharded
from rarefy.weights.checkpoint import Checkpoint
from rarefy.weights.prune import prune
from rarefy.weights.sites import find_sites

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS}, {"input_ids": IDS.flip(0)}]
LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**LLAMA, "attention_bias": True}),
    "tied": ("Llama", {**LLAMA, "tie_word_embeddings": True}),
    "experts": ("Mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "fused": ("Mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
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
        (model.bfloat16() if name == "tied" else model).save_pretrained(made[name], max_shard_size="20KB", save_original_format=name != "fused")
        assert len(list(made[name].glob("*.safetensors"))) > 2
        if name == "tied":
            made["headless"] = tmp_path_factory.mktemp("headless")
            model.model.save_pretrained(made["headless"], max_shard_size="20KB")  # names without the prefix of the whole
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
    ("experts", "sparsegpt", {}),
    ("experts", "magnitude", {"errors": False}),
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


# One process imports, prunes a model of the same widths and two blocks both ways, so that everything lazy is loaded and the
# kernels have their buffers, and then forks one child for each way. A child may map, beyond what the process has mapped by then, 40% of the bytes of the model. The allocator is told to
# give freed blocks back at once: the model's matrices are small enough for it to keep them, those of a large one are not.
LIMITED = """
import json, os, resource, sys, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
import transformers
from rarefy.core.discover import recipes
from rarefy.hub.export import save_dense
from rarefy.hub.load import load
from rarefy.hub.shards import folder_bytes, load_sharded
from rarefy.weights.checkpoint import Checkpoint
from rarefy.weights.prune import prune

small, tall, root = sys.argv[1], sys.argv[2], Path(sys.argv[3])
batches = [{"input_ids": torch.randint(0, 64, (1, 64), generator=torch.Generator().manual_seed(0))}]

def mapped(what):
    return int(next(l for l in open("/proc/self/status") if l.startswith(what)).split()[1]) * 1024

def run(folder, way, out):
    loaded, weights = load_sharded(folder) if way == "streamed" else (load(folder), None)
    with Checkpoint(out.with_suffix(".partial")).locked() as checkpoint:
        record = prune(loaded.model, batches, recipes()["wanda"], density=0.5, errors=False, checkpoint=checkpoint, weights=weights)
        save_dense(loaded.model, None, out, record=record, write=weights.write if weights else None)

for way in ("streamed", "memory"):
    run(small, way, root / f"small-{way}")
size, before = folder_bytes(tall), mapped("VmSize")
for way, share in (("streamed", 0.4), ("memory", 0.4), ("free", None)):
    pid = os.fork()
    if pid == 0:
        if share:
            resource.setrlimit(resource.RLIMIT_AS, (before + int(share * size),) * 2)
        try:
            run(tall, way, root / way)
        except BaseException as error:
            print(json.dumps({"way": way, "error": f"{type(error).__name__}: {error}"}), flush=True)
            os._exit(0)
        print(json.dumps({"way": way, "mapped": (mapped("VmPeak") - before) / size, "size": size}), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists() or not hasattr(os, "fork"), reason="reads the address space from /proc")
def test_a_model_is_pruned_in_less_memory_than_it_takes(tmp_path: Path) -> None:
    widths = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64}
    torch.manual_seed(0)
    for name, layers in (("short", 2), ("tall", 26)):
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**widths, num_hidden_layers=layers)).to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.uniform_(-0.05, 0.05)
        model.save_pretrained(tmp_path / name, max_shard_size="5MB")
        del model
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "short"), str(tmp_path / "tall"), str(tmp_path)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    told = {r["way"]: r for r in map(json.loads, done.stdout.splitlines())}
    assert told["streamed"].get("error") is None and told["streamed"]["mapped"] < 0.4, told
    assert "do not fit in memory; prune it with --stream" in told["memory"]["error"]
    assert told["free"]["mapped"] > 1.0 and told["free"]["size"] > 60e6
    for file in ("model.safetensors", "prune.json"):
        streamed, free = ((tmp_path / way / file).read_bytes().replace(way.encode(), b"") for way in ("streamed", "free"))
        assert streamed == free, file


@pytest.mark.parametrize("name", ["tied", "experts", "fused", "headless"])
def test_output_is_sharded_as_save_pretrained_shards_it(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(shards, "SHARD", "20KB")
    transformers.AutoModelForCausalLM.from_pretrained(folders[name]).save_pretrained(tmp_path / "memory", max_shard_size="20KB")
    (tmp_path / "streamed").mkdir()
    load_sharded(folders[name])[1].write(tmp_path / "streamed")
    memory, streamed = (sorted((tmp_path / side).glob("*.safetensors")) for side in ("memory", "streamed"))
    left, right = ({n: t for p in files for n, t in load_file(p).items()} for files in (memory, streamed))
    assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
    assert len(streamed) > 2
    if name == "tied":  # a layer's experts are views of one tensor in memory and stay in one shard for that; here they need not
        assert all((tmp_path / "streamed" / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "memory").iterdir())
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")


@pytest.mark.parametrize("depends", [False, True])
def test_more_batches_do_not_read_the_blocks_more_often(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depends: bool) -> None:
    """Unless what the blocks are called with depends on their hidden states: then every batch must run through all of them."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    reads: Counter[str] = Counter()
    stored, call = ShardedWeights._stored, LlamaDecoderLayer.__call__

    def counted(self: ShardedWeights, name: str) -> torch.Tensor:
        reads[name] += 1
        return stored(self, name)

    def dependent(self: Any, hidden: torch.Tensor, **more: Any) -> Any:
        return call(self, hidden, **{"seen": float(hidden.abs().mean()) if depends else 1.0, **more})

    monkeypatch.setattr(ShardedWeights, "_stored", counted)
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", dependent)
    counts, outs = [], []
    for number, batches in enumerate((BATCHES, BATCHES * 3)):
        reads.clear()
        loaded, weights = load_sharded(folders["llama"])
        outs.append(prune(loaded.model, batches, recipes()["wanda"], density=0.5, weights=weights, checkpoint=tmp_path / str(number)))
        counts.append(reads["model.layers.1.mlp.up_proj.weight"])
    assert counts == ([5, 9] if depends else [4, 4])  # the key, the chain, the capture of the first batch or of each, the block itself
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"])
    assert prune(model, BATCHES * 3, recipes()["wanda"], density=0.5)["sites"] == outs[1]["sites"]


def test_available_memory_is_the_smaller_of_what_is_free_and_a_containers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal:  900 kB\nMemAvailable:     300 kB\n", "/sys/fs/cgroup/memory.max": "max\n"}
    monkeypatch.setattr(shards, "_text", lambda path: files.get(path, ""))
    assert available_bytes() == 300 * 1024
    files["/sys/fs/cgroup/memory.max"] = "200000\n"
    assert available_bytes() == 200000
    files.clear()
    assert (available_bytes() or 0) > 1e8  # what is built in


def test_every_verb_that_reads_a_model_takes_a_device() -> None:
    import inspect

    import rarefy.cli.verbs
    from rarefy.cli.main import app

    assert rarefy.cli.verbs
    signatures = [inspect.signature(c.callback).parameters for c in app.registered_commands if c.callback]
    loading = [p for p in signatures if "model" in p and str(p["model"].annotation) == "Model"]
    assert len(loading) >= 5 and all("device" in p for p in loading)


@pytest.fixture(scope="module")
def words(folders: dict[str, Path]) -> Path:
    """A model with a tokenizer and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = folders["llama"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "<unk>", *(chr(c) for c in range(97, 123))])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    (folder / "text.txt").write_text("sparse networks choose what to keep " * 100)
    return folder


def command(folder: Path, out: Path, *more: str) -> int:
    return main(["prune", str(folder), "--out", str(out), "--recipe", "wanda", "--calibration", str(folder / "text.txt"), "--calibration-tokens", "256", *more])


def test_the_command_streams_when_asked_and_when_the_model_is_larger_than_memory(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rarefy.cli import loading

    assert command(words, tmp_path / "memory" / "out") == 0
    assert command(words, tmp_path / "asked" / "out", "--stream") == 0
    assert "are streamed" not in capsys.readouterr().err
    monkeypatch.setattr(loading, "available_bytes", lambda: 1000)
    assert command(words, tmp_path / "small" / "out") == 0
    assert "1.0 kB of memory: the weights are streamed" in capsys.readouterr().err
    for side in ("asked", "small"):
        for file in ("model.safetensors", "masks.safetensors", "prune.json", "config.json", "tokenizer.json"):
            assert (tmp_path / side / "out" / file).read_bytes() == (tmp_path / "memory" / "out" / file).read_bytes(), file
    monkeypatch.setattr(loading, "load_sharded", lambda *_, **__: pytest.fail("streamed"))
    assert command(words, tmp_path / "unasked" / "out", "--no-stream") == 0


@pytest.mark.parametrize(("recipe", "message"), [("global-mp", "needs every site's scores at once"), ("gradient", "needs a backward pass")])
def test_what_needs_the_whole_model_is_not_streamed(folders: dict[str, Path], tmp_path: Path, recipe: str, message: str) -> None:
    from dataclasses import replace

    from rarefy.weights.criteria.gradient_weight import GradientWeight
    from rarefy.weights.solvers.keep import Keep

    chosen = replace(recipes()["magnitude"], solver=Keep(GradientWeight())) if recipe == "gradient" else recipes()[recipe]
    loaded, weights = load_sharded(folders["llama"])
    with pytest.raises(Refused, match=message):
        prune(loaded.model, BATCHES, chosen, density=0.5, weights=weights, checkpoint=tmp_path / "p")
    with pytest.raises(Refused, match="kept in a checkpoint, and none was named"):
        prune(loaded.model, BATCHES, recipes()["magnitude"], density=0.5, weights=weights)


def test_folders_that_cannot_be_streamed_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Refused, match="read from a folder on this machine"):
        load_sharded("owner/name")
    shutil.copytree(folders["llama"], tmp_path / "cut")
    shard = sorted((tmp_path / "cut").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    loaded, weights = load_sharded(tmp_path / "cut")
    with pytest.raises(BadFile, match="cannot be read"):
        prune(loaded.model, BATCHES, recipes()["magnitude"], density=0.5, weights=weights, checkpoint=tmp_path / "p")
    shard.unlink()
    with pytest.raises(BadFile, match="it is not there"):
        load_sharded(tmp_path / "cut")
    index = tmp_path / "cut" / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    names["weight_map"] = {k: v for k, v in names["weight_map"].items() if v != shard.name}
    index.write_text(json.dumps(names))
    with pytest.raises(BadFile, match=r"holds no weights for model\.layers\.0"):
        load_sharded(tmp_path / "cut")
    save_file({n: t for p in folders["tied"].glob("*.safetensors") for n, t in load_file(p).items()}, tmp_path / "model.safetensors")
    shutil.copy(folders["tied"] / "config.json", tmp_path)
    load_sharded(tmp_path)
    twice = load_file(tmp_path / "model.safetensors")
    save_file({**twice, "lm_head.weight": twice["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(Refused, match="are tied and stored with different values"):
        load_sharded(tmp_path)


def test_a_model_on_the_meta_device_has_sites_and_a_budget_and_is_not_pruned(folders: dict[str, Path]) -> None:
    real = transformers.AutoModelForCausalLM.from_pretrained(folders["tied"])
    empty = load_sharded(folders["tied"])[0].model
    assert find_sites(empty) == find_sites(real)
    everything = {"include": ["*"]}
    assert find_sites(empty, **everything) == find_sites(real, **everything)
    from rarefy.core.records import Member, Units

    counts = [
        recipes()["magnitude"].allocation.counts([Units(s.name, s.shape, (Member(s.name),)) for s in find_sites(m)], sum(s.numel for s in find_sites(m)) // 3)
        for m in (real, empty)
    ]
    assert counts[0] == counts[1]
    with pytest.raises(BadInput, match="on the meta device: it holds no weights that could be pruned"):
        prune(empty, BATCHES, recipes()["magnitude"], density=0.5)
    with pytest.raises(BadInput, match="device is 'meta'"):
        load_sharded(folders["tied"], device="meta")
