"""The race of whole models: figures that add up, perplexity by the engine's own arithmetic, refusals, each engine against transformers."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from rarefy.core.errors import BadFile, BadInput, RarefyError
from rarefy.hub.load import Loaded
from rarefy.hub.packed import save_packed
from rarefy.kernels.library import native
from rarefy.probes.decoding import WINDOW, _dominates, race

transformers = pytest.importorskip("transformers")
from rarefy.probes.racers import Died, llama_cpp, racer, racers  # noqa: E402
from rarefy.probes.racers.hosted import Hosted, hosted  # noqa: E402
from rarefy.probes.racers.torch_int4 import Int4Linear, use_torch_int4  # noqa: E402

needs_native = pytest.mark.skipif(native() is None, reason="the native kernels were not built here")
IDS = torch.randint(1, 61, (2 * WINDOW + 7,), generator=torch.Generator().manual_seed(0))


def llama(hidden: int = 32) -> Loaded:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=512, initializer_range=0.3)).eval()
    return Loaded(model, None, Path(), "tiny")


def copied(loaded: Loaded) -> Loaded:
    return Loaded(copy.deepcopy(loaded.model), None, Path(), "tiny")


@needs_native
def test_a_race_of_one_model_in_two_engines() -> None:
    loaded = llama()
    racers = [hosted("plain", copied(loaded), "transformers"), hosted("ours", copied(loaded))]
    plain, ours = race(racers, IDS[None, :5], IDS, tokens=3, rounds=5)
    assert plain["ratio"] == plain["ratio_min"] == plain["ratio_max"] == 1 and ours["peer"] == "plain"
    assert plain["claim"] == "sparsity" and ours["claim"] == "engine"
    assert ours["ratio_min"] <= ours["ratio"] <= ours["ratio_max"]
    assert ours["tokens_per_s"] == pytest.approx(1e3 / ours["ms_per_token"])
    with torch.no_grad():
        nll = [torch.nn.functional.cross_entropy(loaded.model(w[None], use_cache=False).logits[0, :-1], w[1:], reduction="sum") for w in IDS.split(WINDOW)]
    want = math.exp(float(torch.stack(nll).sum()) / (len(IDS) - 3))
    assert plain["perplexity"] == pytest.approx(want, rel=1e-4) and ours["perplexity"] == pytest.approx(want, rel=1e-4)
    assert ours["interval"][0] < want < ours["interval"][1] and ours["model_bytes"] == plain["model_bytes"] and ours["scored"] == len(IDS) - 3


@needs_native
def test_a_sparse_claim_needs_one_engine_and_one_precision(tmp_path: Path) -> None:
    loaded = llama()
    sparse = copied(loaded)
    for layer in sparse.model.model.layers:
        layer.mlp.up_proj.weight.data[:32] = 0
    specs = {}
    for name, layout in (("plain", None), ("bitmask", "bitmask"), ("int4", "int4")):
        specs[name] = str(tmp_path / name)
        sparse.model.save_pretrained(specs[name]) if layout is None else save_packed(copied(sparse).model, None, specs[name], layout)
    rows = race(
        [racer(f"{specs['plain']}@native"), racer(specs["bitmask"]), racer(specs["int4"]), racer(specs["bitmask"] + "@native+int8")], IDS[None, :4], IDS[:40], tokens=2, rounds=5
    )
    assert [row["claim"] for row in rows] == ["sparsity", "sparsity", "engine", "engine"]
    assert [row["precision"] for row in rows] == ["float32", "float32", "int4", "float32, head int8"]
    every = sum(p.numel() for n, p in sparse.model.named_parameters() if n.endswith("proj.weight"))
    assert rows[0]["density"] == rows[1]["density"] == pytest.approx(1 - 2 * 32 * 32 / every)
    assert rows[1]["model_bytes"] < rows[0]["model_bytes"]


def test_windows_begin_with_bos() -> None:
    seen = []

    class Spy(Hosted):
        def nll(self, windows):
            seen.append(windows)
            return super().nll(windows)

    spy = Spy("spy", llama(), "transformers")
    rows = race([spy, spy], IDS[None, :2], IDS, bos=7, tokens=1, rounds=5)
    assert all(int(window[0]) == 7 and len(window) <= WINDOW for window in seen[0]) and rows[0]["scored"] == len(IDS)
    assert torch.equal(torch.cat([window[1:] for window in seen[0]]), IDS)


@pytest.mark.parametrize(("better", "worse", "dominates"), [((1, 1, 1), (1, 1, 2), True), ((1, 1, 1), (1, 1, 1), False), ((1, 2, 1), (2, 1, 2), False)])
def test_what_dominates(better: tuple[int, ...], worse: tuple[int, ...], dominates: bool) -> None:
    keys = ("perplexity", "ms_per_token", "model_bytes")
    assert _dominates(dict(zip(keys, better, strict=True)), dict(zip(keys, worse, strict=True))) == dominates


def test_a_race_has_two_models_five_rounds_and_one_vocabulary() -> None:
    runner = hosted("ours", llama(), "transformers")
    with pytest.raises(BadInput, match="1 models in 7 rounds"):
        race([runner], IDS[None, :2], IDS)
    with pytest.raises(BadInput, match="2 models in 3 rounds"):
        race([runner, runner], IDS[None, :2], IDS, rounds=3)
    other = hosted("other", llama(), "transformers")
    other.vocabulary = 62
    with pytest.raises(BadInput, match="ours with 61 tokens, other with 62"):
        race([runner, other], IDS[None, :2], IDS)


def test_torchs_int4_layers_are_the_groups_they_round_to() -> None:
    linear = torch.nn.Linear(64, 48)
    x = torch.randn(3, 64)
    codes = torch.randint(0, 16, (48, 2, 32)).float()
    codes[..., 0], codes[..., 1] = 0, 15
    linear.weight.data = (0.1 * codes - 0.7).flatten(1)  # on the grid, so nothing is lost
    assert torch.allclose(Int4Linear(linear)(x), linear(x), atol=2e-2, rtol=1e-2)  # the kernel sums in bfloat16 where the processor has it
    model = use_torch_int4(llama().model)
    assert sum(isinstance(m, Int4Linear) for m in model.modules()) == 14 and isinstance(model.lm_head, torch.nn.Linear)
    with pytest.raises(BadInput, match="multiples of 16 x 32"):
        use_torch_int4(llama(hidden=48).model)


def test_compiled_with_a_static_cache_decodes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = llama()
    loaded.model.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)  # what is tested is the carrying of the cache
    windows = [IDS[:20], IDS[20:33]]
    for ours, want in zip(racer(f"{tmp_path / 'tiny'}@compiled").nll(windows), hosted("plain", loaded, "transformers").nll(windows), strict=True):
        assert torch.allclose(ours, want, atol=1e-4)


def test_what_llama_cpp_cannot_run_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadFile, match=r"llama\.cpp reads GGUF files"):
        racer(f"{tmp_path}@llama.cpp")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(RarefyError, match="pip install llama-cpp-python"):
        racer(f"{tmp_path / 'model.gguf'}@llama.cpp")
    with pytest.raises(BadInput, match="leave \\+LAYOUT out"):
        racer(f"{tmp_path / 'model.gguf'}@llama.cpp+int8")
    with pytest.raises(BadInput, match="only the native engine"):
        racer(f"{tmp_path}@compiled+int8")


def test_llama_cpp_is_driven_token_by_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the package, which decodes with transformers: positions, wanted logits and forgetting are ours."""
    package, model = stand_in(llama().model), llama()
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    monkeypatch.setattr(llama_cpp, "_types", lambda path: "F32 100%")
    monkeypatch.setattr(llama_cpp, "tried", lambda path: None)  # another process has no stand-in
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    them, us = racer(f"{tmp_path / 'm.gguf'}@llama.cpp"), hosted("plain", model, "transformers")
    windows = [IDS[:9], IDS[9:21]]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(them.nll(windows), us.nll(windows), strict=True))
    assert them.time(IDS[None, :4], 3) > 0
    assert package.sizes == [9, 12, 4, 1, 1, 1] and package.live == 0


def fake_package(folder: Path, monkeypatch: pytest.MonkeyPatch, loading: str) -> None:
    """A package llama_cpp, here and in other processes, that does something when it loads a model."""
    (folder / "fake").mkdir()
    (folder / "fake" / "llama_cpp.py").write_text(
        f"import os, signal\nfrom pathlib import Path\n__version__ = '0'\nclass Llama:\n    def __init__(self, path, **options):\n        {loading}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder / "fake"))
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    monkeypatch.setattr(llama_cpp, "_types", lambda path: "F32 100%")
    for name in ("bad", "good"):
        (folder / f"{name}.gguf").write_bytes(b"GGUF")


def test_an_engine_that_dies_is_named_with_its_signal_and_the_others_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rarefy.cli.main import main

    fake_package(tmp_path, monkeypatch, "'bad' in path and os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(
        Died, match=r"^bad\.gguf@llama\.cpp: llama\.cpp's native code died of SIGSEGV in a trial on this machine, so the race goes on without it; try another build"
    ):
        racer(f"{tmp_path / 'bad.gguf'}@llama.cpp")
    tiny, told = letters(tmp_path / "tiny"), []
    left = racers([f"{tmp_path / 'bad.gguf'}@llama.cpp", f"{tiny}@transformers", f"{tiny}@transformers"], told.append)
    assert [each.name for each in left] == ["tiny", "tiny"] and len(told) == 1 and "SIGSEGV" in told[0]
    with pytest.raises(Died, match="SIGSEGV"):
        racers([f"{tmp_path / 'bad.gguf'}@llama.cpp", f"{tiny}@transformers"], told.append)
    models = [part for spec in (f"{tiny}@transformers", f"{tmp_path / 'bad.gguf'}@llama.cpp", f"{tiny}@transformers") for part in ("--model", spec)]
    capsys.readouterr()
    code = main(["bench", "--op", "decode", *models, "--rounds", "5", "--tokens", "1", "--scored", "300", "--text", str(tmp_path / "tiny" / "text.txt"), "--json"])
    out, said = capsys.readouterr()
    assert code == 0 and [row["engine"].split()[0] for row in json.loads(out)] == ["transformers"] * 2
    assert [line.split(": ")[0] for line in said.splitlines() if "died of SIGSEGV" in line] == ["bad.gguf@llama.cpp"]


def test_a_trial_that_only_fails_is_no_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, monkeypatch, "Path(path + '.seen').write_text(''); raise ValueError('no')")
    llama_cpp.tried(tmp_path / "good.gguf")
    assert (tmp_path / "good.gguf.seen").exists()


def letters(folder: Path) -> str:
    """A model folder with a letter tokenizer and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    llama().model.save_pretrained(folder)
    (folder / "text.txt").write_text("sparse networks choose what to keep " * 40)
    return str(folder)


def stand_in(model) -> ModuleType:
    """The functions of llama_cpp that we call."""
    import ctypes

    package = ModuleType("llama_cpp")
    package.__version__, package.sizes, package.live, package.ids = "0", [], 0, []

    def init(count: int, embedding: int, sequences: int) -> SimpleNamespace:
        package.live += 1
        return SimpleNamespace(n_tokens=0, token=[0] * count, pos=[0] * count, n_seq_id=[0] * count, seq_id=[[9] for _ in range(count)], logits=[0] * count)

    def free(batch: SimpleNamespace) -> None:
        package.live -= 1

    def decode(context: object, batch: SimpleNamespace) -> int:
        assert batch.pos == list(range(len(package.ids), len(package.ids) + batch.n_tokens)) and batch.seq_id == [[0]] * batch.n_tokens
        package.ids += batch.token
        package.sizes.append(batch.n_tokens)
        with torch.no_grad():
            logits = model(torch.tensor([package.ids]), use_cache=False).logits[0, -batch.n_tokens :]
        package.logits = logits[torch.tensor(batch.logits, dtype=torch.bool)].contiguous()
        return 0

    def clear(memory: object, data: bool) -> None:
        package.ids = []

    package.Llama = lambda path, **options: SimpleNamespace(n_vocab=lambda: 61, ctx=None)
    package.llama_batch_init, package.llama_batch_free, package.llama_decode = init, free, decode
    package.llama_get_memory, package.llama_memory_clear = lambda context: None, clear
    package.llama_get_logits = lambda context: ctypes.c_void_p(package.logits.data_ptr())
    return package
