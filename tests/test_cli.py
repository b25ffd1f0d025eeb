"""The command line as a user meets it, on a tiny model folder: tables and JSON, refusals without a traceback, plug-ins."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import rarefy
from rarefy.cli.main import main

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama with a word-level tokenizer, as a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    words = {w: i for i, w in enumerate(["<s>", "<unk>", *(chr(c) for c in range(97, 123))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "text.txt").write_text("sparse networks choose what to keep " * 400)
    return str(folder)


CALIBRATION = ("--calibration", "TINY/text.txt", "--calibration-tokens", "512")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def prune_json(capsys: pytest.CaptureFixture[str], tiny: str, out: Path, *more: str) -> dict[str, Any]:
    code, text, err = run(capsys, "prune", tiny, "--out", str(out), "--calibration", f"{tiny}/text.txt", "--calibration-tokens", "2048", "--json", *more)
    assert code == 0, err
    return json.loads(text)


@pytest.mark.parametrize(("recipe", "pattern"), [("magnitude", None), ("wanda", "2:4"), ("sparsegpt", None), ("owl", None)])
def test_prune_writes_exact_zeros_that_plain_transformers_loads(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path, recipe: str, pattern: str | None) -> None:
    record = prune_json(capsys, tiny, tmp_path / "out", "--recipe", recipe, "--density", "0.5", *(["--pattern", pattern] if pattern else []))
    assert set(record) >= {"model", "recipe", "pattern", "density_requested", "density", "sites", "out"}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as saved:
        for site in record["sites"]:
            assert set(site) >= {"name", "shape", "kept", "density", "error_mask_only", "error"}
            weight = saved.get_tensor(site["name"])
            assert int((weight != 0).sum()) == site["kept"]
            assert 0 <= site["error"] <= site["error_mask_only"] + 1e-6
    assert sum(s["kept"] for s in record["sites"]) == round(0.5 * sum(s["kept"] / s["density"] for s in record["sites"]))
    script = "import sys, transformers as t; m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(int((m.model.layers[0].mlp.up_proj.weight == 0).sum()))"
    if recipe == "magnitude":
        zeros = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True, check=True).stdout
        assert int(zeros) == next(round(s["kept"] / s["density"]) - s["kept"] for s in record["sites"] if "layers.0.mlp.up" in s["name"])


def test_a_matrix_that_keeps_nothing_is_named(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    command = ("prune", tiny, "--recipe", "magnitude", "--calibration", f"{tiny}/text.txt", "--calibration-tokens", "512", "--json")
    code, text, err = run(capsys, *command, "--density", "5e-4", "--allocation", "global", "--out", str(tmp_path / "few"))
    assert code == 0
    record = json.loads(text)
    empty = [site["name"] for site in record["sites"] if site["kept"] == 0]
    assert 0 < len(empty) < 14
    assert record["emptied"] == empty == json.loads((tmp_path / "few" / "prune.json").read_text())["emptied"]
    assert err.startswith(f"warning: {len(empty)} matrices keep no weight at all and compute zeros: {', '.join(empty[:5])} and {len(empty) - 5} more; a larger --density")
    code, text, err = run(capsys, *command, "--density", "1e-7", "--out", str(tmp_path / "none"))
    assert (code, text) == (2, "")
    assert "density 1e-07: it keeps none of 15,360 weights; ask for at least 6.5e-05" in err
    assert not (tmp_path / "none").exists()
    assert "warning" not in run(capsys, *command, "--out", str(tmp_path / "half"))[2]


def test_a_table_says_what_its_errors_are_of(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    command = ("prune", tiny, "--recipe", "magnitude", "--calibration", f"{tiny}/text.txt", "--calibration-tokens", "512")
    code, with_outputs, _ = run(capsys, *command, "--out", str(tmp_path / "a"))
    assert code == 0 and "(mean relative output error)\n" in with_outputs
    code, without, _ = run(capsys, *command, "--no-errors", "--out", str(tmp_path / "b"))
    assert code == 0 and "output error" not in without
    assert "(mean relative error of the weights; no output was measured)\n" in without


def test_two_runs_give_the_same_bytes(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        prune_json(capsys, tiny, tmp_path / name, "--recipe", "random-pruning", "--density", "0.3")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_eval_report_generate_and_compare_on_what_prune_wrote(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "half"
    prune_json(capsys, tiny, out, "--recipe", "wanda")
    code, text, _ = run(capsys, "eval", str(out), "--text", f"{tiny}/text.txt", "--tokens", "2048", "--json")
    record = json.loads(text)
    assert code == 0
    assert set(record) >= {"model", "perplexity", "interval", "tokens", "window", "stride", "bos", "dtype"}
    assert record["interval"][0] <= record["perplexity"] <= record["interval"][1]
    assert run(capsys, "report", str(out))[0] == 0
    page = (out / "report.html").read_text()
    assert "lang=en" in page
    assert "model.layers.0.mlp.up_proj.weight" in page
    assert "http" not in page.replace("http-equiv", "")
    code, text, _ = run(capsys, "generate", str(out), "--prompt", "sparse", "--tokens", "4", "--runs", "1", "--json")
    record = json.loads(text)
    assert code == 0
    assert set(record) >= {"model", "engine", "text", "tokens", "prefill_tokens_per_s", "decode_tokens_per_s", "model_bytes", "rss_bytes"}
    arguments = ("compare", tiny, "--recipes", "magnitude,sparsegpt", "--patterns", "default,2:4", "--calibration", f"{tiny}/text.txt", "--calibration-tokens", "2048")
    arguments = (*arguments, "--text", f"{tiny}/text.txt", "--tokens", "1024", "--journal", str(tmp_path / "rows.json"), "--json")
    first, again = (json.loads(run(capsys, *arguments)[1]) for _ in range(2))
    assert [r["method"] for r in first["rows"]] == ["dense", "magnitude", "sparsegpt", "magnitude", "sparsegpt"]
    assert [r.get("reused") for r in again["rows"]] == [None, True, True, True, True]
    assert [r["value"] for r in first["rows"]] == [r["value"] for r in again["rows"]]
    assert {"rows", "summary"} == set(first)


def test_optimize_stays_within_its_budget(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    arguments = ("optimize", tiny, "--max-loss", "1%", "--out", str(tmp_path / "o"), "--calibration", f"{tiny}/text.txt", "--calibration-tokens", "2048")
    code, text, err = run(capsys, *arguments, "--text", f"{tiny}/text.txt", "--tokens", "2048", "--json")
    record = json.loads(text)
    assert code == 0, err
    assert set(record) >= {"max_loss", "loss", "interval", "chosen", "tried"}
    assert record["chosen"] is not None
    assert record["loss"] <= 0.01
    assert (tmp_path / "o" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("prune", "TINY", "--recipe", "no-such", "--out", "OUT"), "recipe 'no-such': known are"),
        (("prune", "TINY", "--density", "1.5", "--out", "OUT"), "density 1.5: a density is the fraction"),
        (("prune", "TINY", "--pattern", "3:2", "--out", "OUT"), "pattern"),
        (("prune", "TINY", "--allocation", "outlier-share:colour=3", "--out", "OUT"), "not colour"),
        (("prune", "TINY", "--out", "TINY"), "would be replaced"),
        (("prune", "/no/such/model", "--out", "OUT"), "/no/such/model"),
        (("prune", "TINY", "--calibration", "/no/text", "--out", "OUT"), "text /no/text: it cannot be read"),
        (("eval", "TINY", "--text", "TINY/text.txt", "--tokens", "9999999"), "are needed"),
        (("report", "TINY"), "or prune.json"),
        (("catalogue", "--status", "done"), "a row is working, partial, missing"),
        (("optimize", "TINY", "--max-loss", "lots", "--out", "OUT"), "a share is a number"),
        (("train", "digits", "--recipe", "none-such"), "training recipe 'none-such': known are"),
        (("train", "char_lm", "--router", "none-such"), "choice 'none-such': known are"),
        (("train", "digits", "--router", "top-p"), "option router of the task digits"),
        (("--plugin", "/no/plugin.py", "methods"), "a plug-in is a Python file that exists"),
        (("prune",), "Missing argument 'model'; see rarefy prune --help."),
        (("no-such-verb",), "see rarefy --help"),
        (("prune", "TINY", "--seed", "99999999999999999999", "--out", "OUT"), "--seed"),
        (("prune", "TINY", "--allocation", "outlier-share:spread=wide", "--out", "OUT"), "a value of the wrong kind"),
        (("prune", "TINY", "--out", ""), "a folder of its own"),
        (("prune", "TINY", "--pattern", "1:5", "--recipe", "wanda", "--out", "OUT", *CALIBRATION), "q_proj.weight of shape (32, 32): the pattern 1:5 needs"),
        (("prune", "TINY", "--pattern", "2:4", "--density", "0.3", "--out", "OUT", *CALIBRATION), "density 0.3 with pattern 2:4"),
        (("compare", "TINY", "--recipes", ","), "a list names at least one thing"),
        (("compare", "TINY", "--journal", "TINY/config.json", *CALIBRATION, "--text", "TINY/text.txt", "--tokens", "64"), "not those of a journal"),
        (("compare", "TINY", "--journal", "TINY/model.safetensors", *CALIBRATION, "--text", "TINY/text.txt", "--tokens", "64"), "JSON that an earlier run wrote"),
        (("optimize", "TINY", "--heal", "spp", "--out", "OUT"), "without --target"),
        (("optimize", "TINY", "--target", "size", "--heal", "magic", "--out", "OUT"), "magic"),
        (("optimize", "TINY", "--target", "size", "--heal", "spp", "--heal-tokens", "few", "--out", "OUT"), "few"),
        (("optimize", "TINY", "--max-loss", "inf", "--out", "OUT"), "finite"),
        (("optimize", "/no/such/model", "--recipes", "none-such", "--out", "OUT"), "recipe 'none-such'"),
        (("train", "digits", "--steps", "1", "--checkpoints", "TINY/config.json"), "config.json"),
    ],
)
def test_every_refusal_is_one_line_without_a_traceback(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path, argv: tuple[str, ...], message: str) -> None:
    out = tmp_path / "refused"
    code, _, err = run(capsys, *(a.replace("TINY", tiny).replace("OUT", str(out)) for a in argv))
    assert code != 0
    assert message in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    assert not out.exists()


def test_a_truncated_checkpoint_is_one_sentence(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    import shutil

    broken = shutil.copytree(tiny, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = run(capsys, "eval", str(broken), "--text", f"{tiny}/text.txt", "--tokens", "512")
    assert code == 3
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1


def test_a_plug_in_criterion_reaches_the_command_line(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        '"""A plug-in."""\nfrom dataclasses import dataclass\nfrom rarefy.core.roles import Criterion\n\n\n@dataclass(frozen=True)\nclass Fourth(Criterion):\n'
        '    """Fourth power."""\n\n    name = "fourth"\n\n    def scores(self, weight, *, generator=None):\n        return weight.float() ** 4\n'
    )
    code, text, _ = run(capsys, "--plugin", str(plugin), "methods", "--json")
    assert code == 0
    assert {"role": "criterion", "name": "fourth", "what": "Fourth power."} in json.loads(text)
    mine = prune_json(capsys, tiny, tmp_path / "m", "--recipe", "magnitude", "--criterion", "fourth")
    theirs = prune_json(capsys, tiny, tmp_path / "t", "--recipe", "magnitude")
    assert [s["kept"] for s in mine["sites"]] == [s["kept"] for s in theirs["sites"]]
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (tmp_path / "t" / "model.safetensors").read_bytes()


def test_train_resumes_and_the_catalogue_has_172_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    code, text, err = run(capsys, "train", "digits", "--recipe", "gradual-magnitude", "--density", "0.2", "--steps", "20", "--checkpoints", str(tmp_path / "run"), "--json")
    assert code == 0, err
    assert json.loads(text)["density"] == pytest.approx(0.2, abs=1e-3)
    code, text, _ = run(capsys, "catalogue", "--json")
    rows = json.loads(text)
    assert len(rows) == 172
    assert all(set(r) == {"id", "slug", "title", "field", "status", "objects", "composition", "evidence", "deviations"} for r in rows)
    working = {r["slug"] for r in rows if r["status"] == "working"}
    assert working >= {"lamp", "global-mp", "random-pruning", "gradual-magnitude"}
    assert all(r["evidence"]["level"] >= 2 for r in rows if r["status"] == "working")


def test_help_has_an_example_for_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("prune", "heal", "optimize", "pack", "unpack", "export", "push", "eval", "generate", "bench", "compare", "report", "train", "catalogue", "methods", "cache"):
        code, text, _ = run(capsys, verb, "--help")
        assert code == 0
        assert f"rarefy {verb}" in " ".join(text.split()), verb


def test_a_model_with_few_positions_gets_short_windows(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    short = str(tmp_path / "short")
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(short)
    config = transformers.GPT2Config(vocab_size=28, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(short)
    text = ("--calibration", f"{tiny}/text.txt", "--calibration-tokens", "256", "--text", f"{tiny}/text.txt", "--tokens", "256")
    code, _, err = run(capsys, "compare", short, "--recipes", "wanda", *text)
    assert code == 0, err


def test_pipes_are_quiet(tiny: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rarefy", "prune", tiny, "--recipe", "magnitude", "--out", str(tmp_path / "o"), "--json"]
    done = subprocess.run([*command, *(a.replace("TINY", tiny) for a in CALIBRATION)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["pattern"] == "matrix"
    assert done.stderr == ""


def test_a_packed_model_is_not_pruned(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    prune_json(capsys, tiny, tmp_path / "half", "--recipe", "magnitude")
    assert run(capsys, "pack", str(tmp_path / "half"), "--out", str(tmp_path / "packed"))[0] == 0
    code, _, err = run(capsys, "prune", str(tmp_path / "packed"), "--out", str(tmp_path / "again"), *(a.replace("TINY", tiny) for a in CALIBRATION))
    assert code == 5
    assert f"is packed: this verb works on plain weights; run rarefy unpack {tmp_path}/packed --out DIR first" in err
    code, _, err = run(capsys, "prune", str(tmp_path / "packed"), "--stream", "--out", str(tmp_path / "again"))
    assert code == 5
    assert f"run rarefy unpack {tmp_path}/packed --out DIR first" in err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["half", "packed"]


def test_the_model_that_is_read_is_never_replaced(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    parent = tmp_path / "models"
    shutil.copytree(tiny, parent / "dense")
    (parent / "config.json").write_text("{}")
    model = str(parent / "dense")
    before = sorted(f.name for f in (parent / "dense").iterdir())
    for out in (model, f"{parent}/../models/dense", str(parent)):
        for verb in (("prune", model), ("pack", model), ("optimize", model), ("heal", model), ("unpack", model), ("heal", tiny, "--teacher", model)):
            code, _, err = run(capsys, *verb, "--out", out, "--force")
            assert code == 5 and "would be replaced; name another folder" in err, (verb, err)
    assert sorted(f.name for f in (parent / "dense").iterdir()) == before


def test_unpack_writes_the_plain_folder_that_was_packed(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    half, packed, plain = (str(tmp_path / name) for name in ("half", "packed", "plain"))
    prune_json(capsys, tiny, Path(half), "--recipe", "magnitude")
    assert run(capsys, "pack", half, "--out", packed)[0] == 0
    code, out, err = run(capsys, "unpack", packed, "--out", plain)
    assert code == 0, err
    assert "14 matrices unpacked: 32.6 kB became 61.4 kB, 50.00% zeros" in out
    assert "quantization_config" not in json.loads((Path(plain) / "config.json").read_text())
    with safe_open(f"{half}/model.safetensors", "pt") as before, safe_open(f"{plain}/model.safetensors", "pt") as after:
        assert sorted(before.keys()) == sorted(after.keys())
        assert all(torch.equal(before.get_tensor(key), after.get_tensor(key)) for key in before.keys())  # noqa: SIM118
    code, _, err = run(capsys, "unpack", half, "--out", str(tmp_path / "x"))
    assert code == 5 and "is not packed" in err
    model = transformers.AutoModelForCausalLM.from_pretrained(packed)
    model.dequantize().save_pretrained(tmp_path / "by-transformers")
    assert (tmp_path / "by-transformers" / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()


def test_unpack_leaves_no_gate_out_unasked(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    gated, plain = str(tmp_path / "gated"), str(tmp_path / "plain")
    assert run(capsys, "pack", tiny, "--out", gated, "--gate", "topk:density=0.5", "--gate-at", "*.mlp.down_proj", *(a.replace("TINY", tiny) for a in CALIBRATION))[0] == 0
    code, _, err = run(capsys, "unpack", gated, "--out", plain)
    assert code == 5
    assert "the gate on model.layers.0.mlp.down_proj and 1 more: a plain folder cannot hold it" in err
    assert not Path(plain).exists()
    code, out, _ = run(capsys, "unpack", gated, "--out", plain, "--drop-gates", "--json")
    assert code == 0
    assert [gate["name"] for gate in json.loads(out)["dropped_gates"]] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    model, dense = transformers.AutoModelForCausalLM.from_pretrained(plain), transformers.AutoModelForCausalLM.from_pretrained(tiny)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), dense.state_dict().values(), strict=True))


def test_an_interrupted_verb_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rarefy.cli.evaluate.load", stop)
    assert run(capsys, "eval", tiny) == (130, "", "error: interrupted; nothing half-written was left, run the same command again\n")


@pytest.mark.parametrize(
    ("most", "said", "left"),
    [
        (8_000, "a file of it is larger than this system's limit; free some space or name another folder; nothing was finished, nothing was kept; the same command begins", []),
        (64_000, "nothing half-written was left; 2 of 2 blocks are kept in {out}.partial; the same command goes on from there.", ["out.partial"]),
    ],
)
def test_no_room_says_what_is_left_and_where(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path, most: int, said: str, left: list[str]) -> None:
    resource = pytest.importorskip("resource")
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        code, _, err = run(capsys, "prune", tiny, "--out", str(out), *(a.replace("TINY", tiny) for a in CALIBRATION))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 6
    assert said.format(out=out) in err
    assert len(err.splitlines()) == 1
    assert [f.name for f in tmp_path.iterdir()] == left


def test_the_version_says_what_computes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rarefy.kernels.library import native

    code, out, _ = run(capsys, "--version")
    assert code == 0 and out.startswith(f"rarefy {rarefy.__version__}\n") and f"torch {torch.__version__}, transformers {transformers.__version__}" in out
    if native() is not None:
        assert f"\nnative kernels: {native().isa()}, 1 thread" in out
    monkeypatch.setenv("RAREFY_NATIVE", "off")
    assert "\nnative kernels: none, everything runs in PyTorch, slower (RAREFY_NATIVE=off in the environment)\n" in run(capsys, "--version")[1]


@pytest.mark.parametrize(
    ("found", "said"),
    [(ModuleNotFoundError("no"), "they were not built; with a C++17 compiler"), (ImportError("libgomp.so.1: cannot open"), "they do not load: libgomp.so.1: cannot open; with")],
)
def test_verbs_that_need_kernels_say_why_there_are_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: str, tmp_path: Path, found: ImportError, said: str
) -> None:
    real = importlib.import_module

    def broken(name: str, package: str | None = None) -> Any:
        if name.endswith("_native"):
            raise found
        return real(name, package)

    monkeypatch.setattr("rarefy.kernels.library._extension", None)
    monkeypatch.setattr("importlib.import_module", broken)
    monkeypatch.setattr("rarefy.cli.pack.Chooser", lambda *_: "bitmask")  # the choice itself takes seconds
    for verb in (("pack", tiny, "--layout", "auto", "--out", str(tmp_path / "o")), ("generate", tiny, "--tokens", "2", "--runs", "1")):
        code, _, err = run(capsys, *verb)
        assert code == 0, err
        assert err.count("note: native kernels: none, everything runs in PyTorch, slower (" + said) == 1
    assert "note:" not in run(capsys, "generate", tiny, "--tokens", "2", "--runs", "1", "--engine", "transformers")[2]


def test_pack_says_why_a_matrix_stays_dense(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    code, out, err = run(capsys, "pack", tiny, "--out", str(tmp_path / "packed"))
    assert code == 0, err
    assert "14 stay dense: packed it would be no smaller" in out
