"""A prune that is killed at any moment goes on to the bytes of one that was not; a checkpoint of another job is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from rarefy.cli.main import main
from rarefy.core.discover import recipes
from rarefy.core.errors import BadFile, Refused
from rarefy.hub.export import save_dense
from rarefy.weights.checkpoint import Checkpoint, unpack
from rarefy.weights.prune import prune

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
# Every run of the command forks from one warm process, which kills it at a random moment of real time: of the whole run, or
# of its saving phase, whose beginning the child tells through a pipe.
SCRIPT = """
import json, os, random, shutil, signal, sys, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
from rarefy.cli import prune as verb
from rarefy.cli.main import main

folder, root, cases = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
FILES = ("model.safetensors", "masks.safetensors", "prune.json")

def command(out, options):
    return main(["prune", folder, "--out", str(out), "--calibration", f"{folder}/text.txt", "--calibration-tokens", "256", *options])

def start(out, options):
    told, tell = os.pipe()
    pid = os.fork()
    if pid:
        os.close(tell)
        return pid, told
    save = verb.save_dense
    def announced(*arguments, **more):
        os.write(tell, b"s")
        return save(*arguments, **more)
    verb.save_dense = announced
    sys.stdout = sys.stderr = open(out.parent / "log", "a")
    try:
        os._exit(command(out, options))
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(99)

def end(pid, told):
    os.close(told)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0

def whole(out, options):
    began = time.monotonic()
    pid, told = start(out, options)
    assert os.read(told, 1) == b"s"
    saving = time.monotonic()
    assert end(pid, told)
    return saving - began, time.monotonic() - saving

def same(left, right):
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in FILES)

assert command(root / "warm", []) == 0  # imports and caches, before any fork
report = {}
for options, kills, seed in cases:
    base, rng = root / f"case-{seed}", random.Random(seed)
    for name in ("whole", "killed"):
        (base / name).mkdir(parents=True)
    out, partial = base / "killed" / "half", base / "killed" / "half.partial"
    prunes, saves = whole(base / "whole" / "half", options)
    told = {"killed": 0, "saving": 0, "resumed": 0, "started anew": 0, "same": True}
    while told["killed"] < kills:
        told["resumed"] += any(partial.glob("[!.]*.safetensors"))
        pid, pipe = start(out, options)
        saving = told["killed"] % 3 == 2
        if saving:
            os.read(pipe, 1)
        time.sleep(rng.uniform(0,  (saves if saving else prunes + saves)))
        os.kill(pid, signal.SIGKILL)
        done = end(pid, pipe)
        told["killed"] += not done
        told["saving"] += saving and not done
        if out.exists():  # whole under its name, whenever the kill came
            told["same"] &= same(out, base / "whole" / "half")
            told["started anew"] += 1
            shutil.rmtree(out)
            shutil.rmtree(partial, ignore_errors=True)
    told["resumed"] += any(partial.glob("[!.]*.safetensors"))
    assert end(*start(out, options))
    told["same"] &= same(out, base / "whole" / "half")
    told["left"] = sorted(p.name for p in out.parent.iterdir())
    report[str(seed)] = told
print(json.dumps(report))
"""
# options, kills, seed
CASES: list[tuple[list[str], int, int]] = [
    (["--recipe", "sparsegpt"], 10, 1),
    (["--recipe", "sparsegpt", "--mode", "parallel"], 2, 2),
    (["--recipe", "owl"], 2, 3),
    (["--recipe", "magnitude", "--no-errors"], 2, 4),
    (["--recipe", "sparsegpt", "--stream"], 3, 5),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2)
    target = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(target)
    return str(target)


def load(folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def outcomes(words: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("killed")
    command, env = [sys.executable, "-c", SCRIPT, words, str(root), json.dumps(CASES)], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=240)
    logs = "".join(p.read_text() for p in root.rglob("log"))
    assert done.returncode == 0, done.stderr + logs
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize(("options", "kills", "seed"), CASES, ids=lambda v: "".join(v) if isinstance(v, list) else str(v))
def test_killed_at_random_moments_it_ends_with_the_same_bytes(outcomes: dict[str, dict[str, Any]], options: list[str], kills: int, seed: int) -> None:
    told = outcomes[str(seed)]
    print(f"seed {seed}: {told}")
    assert told["same"]
    assert told["killed"] == kills
    assert told["left"] == ["half", "log"]
    if kills == 10:
        assert told["resumed"] >= 1 and told["saving"] >= 1


class Stop(Exception):
    """Stands for Ctrl-C."""


def stop_at(block: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, label: str) -> None:
        if label.startswith("prune model.layers") and done == block:
            raise Stop

    return progress


def half_done(folder: str, partial: Path, block: int = 3, **options: Any) -> None:
    with pytest.raises(Stop):
        prune(load(folder), [{"input_ids": IDS}], recipes()["sparsegpt"], density=0.5, checkpoint=partial, progress=stop_at(block), **options)


@pytest.mark.parametrize("mode", ["cascade", "parallel"])
@pytest.mark.parametrize("block", [1, 3, 4])
def test_finished_blocks_are_read_and_not_solved(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, block: int) -> None:
    half_done(folder, tmp_path / "p", block, mode=mode)
    whole, resumed = load(folder), load(folder)
    masks: list[dict[str, torch.Tensor]] = [{}, {}]
    arguments: dict[str, Any] = {"density": 0.5, "mode": mode}
    record = prune(whole, [{"input_ids": IDS}], recipes()["sparsegpt"], on_pruned=lambda s, p: masks[0].update({s.name: p.mask}), **arguments)
    solver, solved = type(recipes()["sparsegpt"].solver), []
    original = solver.solve

    def counted(self: Any, weights: Any, *args: Any, **more: Any) -> Any:
        solved.extend(weights)
        return original(self, weights, *args, **more)

    monkeypatch.setattr(solver, "solve", counted)
    told: list[tuple[int, int]] = []
    checkpoint = Checkpoint(tmp_path / "p", on_resume=lambda done, total: told.append((done, total)))
    again = prune(resumed, [{"input_ids": IDS}], recipes()["sparsegpt"], checkpoint=checkpoint, on_pruned=lambda s, p: masks[1].update({s.name: p.mask}), **arguments)
    assert told == [(block, 5)]
    assert {int(name.split(".")[2]) for name in solved} == set(range(block, 5))
    assert json.dumps(again) == json.dumps(record)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert masks[0].keys() == masks[1].keys() and all(torch.equal(m, masks[1][n]) for n, m in masks[0].items())


def test_a_whole_model_group_biases_and_sites_outside_the_chain_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).bfloat16()
    for recipe in ("magnitude", "sparsegpt"):
        models = [nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).bfloat16() for _ in range(2)]
        for model in models:
            model.load_state_dict(dense.state_dict())
        records = [prune(m, [torch.ones(3, 6).bfloat16()], recipes()[recipe], density=0.5, checkpoint=tmp_path / recipe) for m in models]
        assert records[0] == records[1]
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


CHANGES: dict[str, dict[str, Any]] = {
    "density": {"density": 0.4},
    "seed": {"seed": 1},
    "mode": {"mode": "parallel"},
    "exclude": {"exclude": ["*down_proj"]},
    "errors": {"errors": False},
}


@pytest.mark.parametrize("change", [*CHANGES, "recipe", "batches", "weights"])
def test_a_checkpoint_of_another_prune_is_refused_and_kept(folder: str, tmp_path: Path, change: str) -> None:
    partial = tmp_path / "p"
    half_done(folder, partial)
    before = {p.name: p.read_bytes() for p in partial.iterdir()}
    model, batches = load(folder), [{"input_ids": IDS.flip(0) if change == "batches" else IDS}]
    if change == "weights":
        with torch.no_grad():
            model.model.norm.weight[0] += 1
    recipe = recipes()["wanda" if change == "recipe" else "sparsegpt"]
    with pytest.raises(Refused, match="delete it or pass --force"):
        prune(model, batches, recipe, checkpoint=partial, **{"density": 0.5, **CHANGES.get(change, {})})
    assert {p.name: p.read_bytes() for p in partial.iterdir()} == before


@pytest.mark.parametrize("damage", ["header", "half", "last byte", "flipped", "key"])
def test_a_damaged_checkpoint_is_refused(folder: str, tmp_path: Path, damage: str) -> None:
    half_done(folder, tmp_path / "p")
    path = tmp_path / "p" / "key.json" if damage == "key" else sorted((tmp_path / "p").glob("*.safetensors"))[0]
    data = path.read_bytes()
    cut = {"header": data[:5], "half": data[: len(data) // 2], "last byte": data[:-1], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "key": data[:4]}[damage]
    path.write_bytes(cut)
    with pytest.raises(BadFile, match="truncated or was changed"):
        prune(load(folder), [{"input_ids": IDS}], recipes()["sparsegpt"], density=0.5, checkpoint=tmp_path / "p")


def test_killed_before_the_first_file_has_its_name(tmp_path: Path) -> None:
    (tmp_path / f".key.json.tmp-{os.getpid()}").write_text('{"ke')
    checkpoint = Checkpoint(tmp_path).open("key")
    assert checkpoint.get("block") is None
    checkpoint.put("block", {"a": torch.ones(1)}, [])
    assert Checkpoint(tmp_path).open("key").get("block") is not None


def test_a_folder_that_is_no_checkpoint_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    for replace in (False, True):
        with pytest.raises(Refused, match="no checkpoint"):
            Checkpoint(tmp_path, replace=replace).open("key")
    Checkpoint(tmp_path).remove()
    assert (tmp_path / "thesis.txt").read_text() == "years"


@pytest.fixture(scope="module")
def words(folder: str) -> str:
    """The model with a word-level tokenizer, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {w: i for i, w in enumerate(["<s>", "<unk>", *(chr(c) for c in range(97, 123))])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    (Path(folder) / "text.txt").write_text("sparse networks choose what to keep " * 100)
    return folder


def test_the_command_goes_on_says_so_and_cleans_up(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(out: str, *more: str) -> int:
        return main(["prune", words, "--out", str(tmp_path / out), "--calibration", f"{words}/text.txt", "--calibration-tokens", "512", "--json", *more])

    put, calls = Checkpoint.put, []

    def interrupted(self: Checkpoint, *arguments: Any) -> None:
        put(self, *arguments)
        calls.append(arguments[0])
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "put", interrupted)
    assert command("half") == 130
    assert capsys.readouterr().err.endswith(f"error: interrupted: 2 of 5 blocks are kept in {tmp_path}/half.partial; the same command goes on from there.\n")
    monkeypatch.setattr(Checkpoint, "put", put)
    assert (tmp_path / "half.partial" / "key.json").is_file()
    assert not (tmp_path / "half").exists()
    assert command("half", "--density", "0.4") == Refused("", "").exit_code
    assert "delete it or pass --force" in capsys.readouterr().err
    assert command("half") == 0
    captured = capsys.readouterr()
    assert "resumed after 2 of 5 blocks" in captured.err
    assert not (tmp_path / "half.partial").exists()
    assert command("whole") == 0
    assert "resumed" not in capsys.readouterr().err
    for name in ("model.safetensors", "masks.safetensors"):
        assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    record, other = (json.loads((tmp_path / out / "prune.json").read_text()) for out in ("half", "whole"))
    assert {**record, "out": ""} == {**other, "out": ""}
    with safe_open(tmp_path / "half" / "masks.safetensors", "pt") as masks, safe_open(tmp_path / "half" / "model.safetensors", "pt") as weights:
        assert set(masks.keys()) == {s["name"] for s in record["sites"]}
        for site in record["sites"]:
            mask = unpack(masks.get_tensor(site["name"]), tuple(site["shape"]))
            assert int(mask.sum()) == site["kept"]
            assert not weights.get_tensor(site["name"])[~mask].any()


def test_force_replaces_a_checkpoint_of_another_prune(folder: str, tmp_path: Path) -> None:
    half_done(folder, tmp_path / "p")
    old = (tmp_path / "p" / "key.json").read_bytes()
    prune(load(folder), [{"input_ids": IDS}], recipes()["sparsegpt"], density=0.4, checkpoint=Checkpoint(tmp_path / "p", replace=True))
    assert (tmp_path / "p" / "key.json").read_bytes() != old


def test_two_runs_do_not_share_a_checkpoint(folder: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batches = [{"input_ids": IDS}]
    with Checkpoint(tmp_path / "half.partial").locked() as mine:
        with pytest.raises(Refused, match="another run writes the same output now"):
            prune(load(folder), batches, recipes()["magnitude"], density=0.5, checkpoint=tmp_path / "half.partial")
        assert main(["prune", words, "--out", str(tmp_path / "half"), "--force"]) == Refused("", "").exit_code
        assert "in use: another run writes the same output now" in capsys.readouterr().err
        prune(load(folder), batches, recipes()["magnitude"], density=0.5, checkpoint=mine)
        assert any(mine.folder.iterdir())
    prune(load(folder), batches, recipes()["magnitude"], density=0.5, checkpoint=tmp_path / "half.partial")
    mine.remove()
    with Checkpoint(tmp_path / "unused").locked():
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_is_taken_on_the_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner finishes and removes its folder between our opening and our locking it."""
    fcntl, removed = pytest.importorskip("fcntl"), []
    flock = fcntl.flock

    def late(handle: int, operation: int) -> None:
        if not removed:
            (tmp_path / "p").rmdir()
            removed.append(handle)
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with Checkpoint(tmp_path / "p").locked(), pytest.raises(Refused), Checkpoint(tmp_path / "p").locked():
        pass


def test_a_data_free_recipe_keeps_its_blocks(folder: str, tmp_path: Path) -> None:
    def stop(done: int, total: int, label: str) -> None:
        if done == 3:
            raise Stop

    told: list[tuple[int, int]] = []
    with pytest.raises(Stop):
        prune(load(folder), [], recipes()["magnitude"], density=0.5, checkpoint=tmp_path / "p", progress=stop)
    models = [load(folder), load(folder)]
    checkpoint = Checkpoint(tmp_path / "p", on_resume=lambda done, total: told.append((done, total)))
    records = [prune(m, [], recipes()["magnitude"], density=0.5, checkpoint=c) for m, c in zip(models, (checkpoint, None), strict=True)]
    assert told == [(3, 5)]
    assert records[0] == records[1]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_an_extra_file_appears_with_the_folder_or_neither_does(folder: str, tmp_path: Path) -> None:
    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(Refused, match="disk is full"):
        save_dense(load(folder), None, tmp_path / "out", extra={"masks": full})
    assert not list(tmp_path.iterdir())
    save_dense(load(folder), None, tmp_path / "out", extra={"masks": lambda path: path.touch()})
    assert (tmp_path / "out" / "masks").exists() and (tmp_path / "out" / "model.safetensors").exists()
