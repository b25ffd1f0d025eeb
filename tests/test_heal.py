"""Healing: what was zero stays zero, what was frozen stays frozen, and a run that was stopped ends in the same bytes."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.attach import attach_view, viewed
from rarefy.core.discover import methods
from rarefy.core.errors import BadInput, Refused
from rarefy.core.exact import keep_count
from rarefy.core.roles import asks
from rarefy.surgery import heal as heal_module
from rarefy.surgery.adapters import Adaptation
from rarefy.surgery.distil import Teacher, divergence, next_token_loss
from rarefy.surgery.gradients import mean_gradients
from rarefy.surgery.heal import Training, fold, heal, pruned_sites
from rarefy.weights.checkpoint import Checkpoint
from rarefy.weights.patterns import parse_pattern

transformers = pytest.importorskip("transformers")
METHODS = methods(Adaptation)
PATTERNS = ("matrix", "row", "2:4", "4:8", "block:1x32", "row-block:1x16", "block:4x1", "rows", "columns")
VOCABULARY = 32


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **{**sizes, **options})).eval()


def windows(count: int, length: int = 24) -> list[Tensor]:
    """Windows of a cycle of tokens with a random start: something that can be learned."""
    starts = torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))
    return [((start + 5 * torch.arange(length)) % VOCABULARY)[None] for start in starts]


def cut(model: nn.Module, pattern: str = "matrix", density: float = 0.5) -> nn.Module:
    """Magnitude pruning under a pattern, of every matrix of the blocks."""
    chosen = parse_pattern(pattern)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layers." in name and p.dim() == 2:
                p.mul_(chosen.mask(p.abs(), chosen.nearest(tuple(p.shape), keep_count(p.numel(), density))))
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def loss(model: Any, given: list[Tensor]) -> float:
    with torch.no_grad():
        return float(torch.stack([next_token_loss(model, ids) for ids in given]).mean())


FAST = Training(lr=0.02, batch=2, save_every=2)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_zeros_are_the_same_set_and_all_else_is_untouched(method: type[Any], pattern: str) -> None:
    model = cut(llama(), pattern)
    before = weights(model)
    report = heal(model, windows(6), method(), training=FAST)
    after = weights(model)
    trained = {key for key in before if "layers." in key and before[key].dim() == 2}
    assert report["zeros"]["lost"] == 0 and report["zeros"]["before"] == report["zeros"]["after"] == sum(int((before[k] == 0).sum()) for k in trained)
    for key, old in before.items():
        assert torch.equal(old == 0, after[key] == 0), key
        assert torch.equal(old, after[key]) == (key not in trained), key
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear and not viewed(model)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_learns(method: type[Any]) -> None:
    model, given = cut(llama(), "2:4"), windows(40)
    before = loss(model, given)
    lr, batch = {"spp": (0.1, 2), "int4-scales": (0.2, 1)}.get(method.name, (0.01, 2))
    report = heal(model, given, method(), training=Training(lr=lr, batch=batch))
    assert loss(model, given) < before - 0.2
    assert report["steps"] == 40 // batch == len(report["train_loss"]) and report["tokens"] == 40 * 24


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_folding_in_is_what_the_adapter_computed(method: type[Any], transposed: bool) -> None:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval() if transposed else cut(llama(), "2:4")
    if transposed:
        with torch.no_grad():
            for block in model.transformer.h:
                block.mlp.c_fc.weight.mul_(torch.arange(32)[:, None] % 2)
    ids = windows(1)[0]

    def look(done: int, total: int, label: str) -> None:
        assert viewed(model)
        model.eval()
        seen.append(model(input_ids=ids).logits.detach())
        model.train()

    seen: list[Tensor] = []
    plain = model(input_ids=ids).logits
    heal(model, windows(6), method(), training=Training(lr=0.05, warmup=0.0), progress=look)
    healed = model(input_ids=ids).logits
    assert not torch.allclose(plain, healed, atol=1e-3)
    assert torch.allclose(seen[-1], healed, atol=2e-5)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_momentum_and_decay_reach_no_frozen_weight(method: type[Any]) -> None:
    model = cut(llama())
    before = weights(model)

    def look(done: int, total: int, label: str) -> None:
        for key, old in before.items():
            path, _, name = key.rpartition(".")
            raw = model.get_submodule(path)._parameters[name]
            assert torch.equal(raw, old) and not raw.requires_grad, key
        for weight, view in viewed(model).values():
            assert not bool(view.export(weight).weight[weight == 0].any())
            for name, p in view.named_parameters():
                assert name != "change" or not bool(p[weight == 0].any()), "a learned change moved where the matrix is zero"

    heal(model, windows(8), method(), training=Training(lr=0.05, decay=0.5), progress=look)
    assert all(p.requires_grad for p in model.parameters())


def test_decay_acts_on_what_learns() -> None:
    free, held = cut(llama()), cut(llama())
    heal(free, windows(8), METHODS["full"](), training=Training(lr=0.05, warmup=0.0))
    heal(held, windows(8), METHODS["full"](), training=Training(lr=0.05, warmup=0.0, decay=10.0))
    start = cut(llama())
    moved = [sum(float((weights(m)[k] - v).square().sum()) for k, v in weights(start).items()) for m in (free, held)]
    assert moved[1] < moved[0]


# -- stopping and going on
class Stop(Exception):
    pass


def stopper(step: int) -> Any:
    def stop(done: int, total: int, label: str) -> None:
        if done == step:
            raise Stop

    return stop


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_that_was_stopped_ends_in_the_same_bytes(method: type[Any], tmp_path: Path) -> None:
    whole, parts = cut(llama()), cut(llama())
    straight = heal(whole, windows(14), method(), training=FAST)
    before = weights(parts)
    told: list[tuple[int, int]] = []
    for step in (3, 5):
        with pytest.raises(Stop):
            heal(parts, windows(14), method(), training=FAST, checkpoint=Checkpoint(tmp_path / "p"), progress=stopper(step))
        assert all(torch.equal(before[k], v) for k, v in weights(parts).items()) and not viewed(parts)
    report = heal(parts, windows(14), method(), training=FAST, checkpoint=Checkpoint(tmp_path / "p", on_resume=lambda *at: told.append(at)))
    assert told == [(4, 7)] and report == straight
    assert all(torch.equal(weights(whole)[k], v) for k, v in weights(parts).items())


def test_a_killed_run_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    whole, killed = cut(llama()), cut(llama())
    heal(whole, windows(14), METHODS["spp"](), training=FAST)

    def die(done: int, total: int, label: str) -> None:
        if done == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    if (pid := os.fork()) == 0:
        heal(killed, windows(14), METHODS["spp"](), training=FAST, checkpoint=Checkpoint(tmp_path / "p"), progress=die)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    told: list[tuple[int, int]] = []
    heal(killed, windows(14), METHODS["spp"](), training=FAST, checkpoint=Checkpoint(tmp_path / "p", on_resume=lambda *at: told.append(at)))
    assert told == [(4, 7)] and all(torch.equal(weights(whole)[k], v) for k, v in weights(killed).items())


@pytest.mark.parametrize("change", ["method", "lr", "text", "weights", "teacher"])
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change: str) -> None:
    with pytest.raises(Stop):
        heal(cut(llama()), windows(14), METHODS["spp"](), training=FAST, checkpoint=Checkpoint(tmp_path / "p"), progress=stopper(3))
    model = cut(llama(), "2:4" if change == "weights" else "matrix")
    teacher = Teacher(llama()) if change == "teacher" else None
    method = METHODS["spp"](rank=4) if change == "method" else METHODS["spp"]()
    how = Training(lr=0.03, batch=2) if change == "lr" else FAST
    with pytest.raises(Refused, match="another run"):
        heal(model, windows(13 if change == "text" else 14), method, teacher=teacher, training=how, checkpoint=Checkpoint(tmp_path / "p"))


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    model = cut(llama())
    before, held = weights(model), Checkpoint(tmp_path / "p")

    def poison(done: int, total: int, label: str) -> None:
        if done == 5:
            next(iter(viewed(model).values()))[1].change.data.fill_(float("nan"))

    with pytest.raises(BadInput, match=r"loss at step 6 is nan.*checkpoint of step 4 is kept.*lower the learning rate"):
        heal(model, windows(16), METHODS["full"](), training=FAST, checkpoint=held, progress=poison)
    assert all(torch.equal(before[k], v) for k, v in weights(model).items()) and not viewed(model)
    tensors, [record] = held.get("state")
    assert len(record["losses"]) == 4 and all(bool(torch.isfinite(t).all()) for t in tensors.values())


def test_a_gradient_that_is_not_finite_is_named_before_it_is_used() -> None:
    model = cut(llama())

    def poison(done: int, total: int, label: str) -> None:
        next(iter(viewed(model).values()))[1].change.register_hook(lambda g: g * float("inf"))

    with pytest.raises(BadInput, match="gradient at step 2 is"):
        heal(model, windows(6), METHODS["full"](), training=FAST, progress=poison)


def test_a_step_follows_the_mean_loss_of_its_windows() -> None:
    model, given = llama(), windows(3)
    for p in model.parameters():
        p.requires_grad_(False)
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    (wanted,) = torch.autograd.grad(torch.stack([next_token_loss(model, ids) for ids in given]).mean(), [weight])
    before = weight.detach().clone()
    losses = (next_token_loss(model, ids) for ids in given)
    heal_module.descend(losses, 3, torch.optim.SGD([weight], lr=9.0), 0.5, 1e9, "loss", heal_module.Place(1, 0, None))
    assert torch.allclose(before - weight.detach(), 0.5 * wanted, atol=1e-6)


def test_a_learning_rate_that_is_too_high_never_saves_what_is_not_finite(tmp_path: Path) -> None:
    held = Checkpoint(tmp_path / "p")
    with pytest.raises(BadInput, match=r"(loss|gradient) at step \d+ is"):
        heal(cut(llama()), windows(16), METHODS["masked-lora"](), training=Training(lr=1e25, save_every=1, warmup=0.0), checkpoint=held)
    tensors, _ = held.get("state")
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())


# -- the parts
def test_a_kept_weight_that_is_trained_to_zero_stays_out_of_the_pattern_of_zeros() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, -2.0, 3.0, 0.0]]))
    view = METHODS["full"]().view(model[0].weight, generator=torch.Generator())
    with torch.no_grad():
        view.change.copy_(torch.tensor([[7.0, 2.0, 1.0, 7.0]]))
    attach_view(model, "0.weight", view)
    fold(model)
    assert model[0].weight.tolist() == [[0.0, -torch.finfo(torch.float32).tiny, 4.0, 0.0]]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_bf16_in_gives_bf16_out(method: type[Any]) -> None:
    model = cut(llama()).bfloat16()
    before = weights(model)
    heal(model, windows(6), method(), training=FAST)
    assert all(v.dtype == torch.bfloat16 and torch.equal(v == 0, before[k] == 0) for k, v in weights(model).items())
    assert any(not torch.equal(v, before[k]) for k, v in weights(model).items())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_making_activations_again_changes_no_byte(method: type[Any]) -> None:
    kept, remade = cut(llama()), cut(llama())
    for model, again in ((kept, False), (remade, True)):
        heal(model, windows(6), method(), training=Training(lr=0.02, recompute=again))
    assert all(torch.equal(weights(kept)[k], v) for k, v in weights(remade).items())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in remade.modules())


def test_the_users_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model = cut(llama())
    torch.set_rng_state(state)
    heal(model, windows(4), METHODS["spp"](), training=FAST)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mean_gradient_is_autograds_and_is_freed() -> None:
    model, given = cut(llama()), windows(3)
    parameters = {s.key: model.get_parameter(s.key) for s in pruned_sites(model)}
    found = mean_gradients(parameters, given, lambda ids: next_token_loss(model, ids))
    assert all(p.grad is None for p in parameters.values())
    whole = torch.stack([next_token_loss(model, ids) for ids in given]).mean()
    for key, wanted in zip(parameters, torch.autograd.grad(whole, list(parameters.values())), strict=True):
        assert torch.allclose(found[key], wanted, atol=1e-6)


# -- the teacher
def test_divergence_is_the_sum_written_out() -> None:
    s, t = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, q = (x / 2.0 for x in (t, s))
    brute = sum(float(p[n].exp()[v] / p[n].exp().sum()) * float(p[n].log_softmax(0)[v] - q[n].log_softmax(0)[v]) for n in range(3) for v in range(5)) * 4 / 3
    assert float(divergence(s, t, 2.0)) == pytest.approx(brute, rel=1e-5)
    assert float(divergence(t, t, 2.0)) == pytest.approx(0.0, abs=1e-6)


def distance(model: Any, given: list[Tensor], teacher: Teacher) -> float:
    with torch.no_grad():
        return float(torch.stack([next_token_loss(model, ids, teacher) for ids in given]).mean())


def test_alpha_mixes_and_a_teacher_alone_is_enough() -> None:
    dense, ids = llama(initializer_range=0.2), windows(1)[0]
    sparse = cut(copy.deepcopy(dense), density=0.2)
    task, both = (float(next_token_loss(sparse, ids, t).detach()) for t in (None, Teacher(dense, 0.5, 2.0)))
    only = float(next_token_loss(sparse, ids, Teacher(dense, 1.0, 2.0)).detach())
    assert both == pytest.approx(0.5 * task + 0.5 * only, rel=1e-5)
    assert float(next_token_loss(sparse, ids, Teacher(dense, 0.0, 2.0)).detach()) == task
    noise = [torch.randint(0, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(i)) for i in range(30)]
    before, teacher = weights(dense), Teacher(dense, 1.0, 1.0)
    far = distance(sparse, noise, teacher)
    heal(sparse, noise, METHODS["full"](), teacher=teacher, training=Training(lr=0.03))
    assert distance(sparse, noise, teacher) < 0.7 * far
    assert all(torch.equal(before[k], v) for k, v in weights(dense).items())


def test_a_teacher_of_another_vocabulary_is_refused_and_the_model_left_plain() -> None:
    model = cut(llama())
    with pytest.raises(BadInput, match="vocabulary"):
        heal(
            model,
            windows(2),
            METHODS["spp"](),
            teacher=Teacher(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**model.config.to_dict(), "vocab_size": 40}))),
        )
    assert not viewed(model)
    for alpha, temperature in ((-0.1, 1.0), (1.1, 1.0), (0.5, 0.0)):
        with pytest.raises(BadInput):
            Teacher(model, alpha, temperature)


# -- refusals
def test_a_model_without_zeros_is_refused() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 0.0
    with pytest.raises(Refused, match="prune it first"):
        heal(model, windows(2), METHODS["spp"]())


def test_a_packed_model_and_one_with_views_are_refused() -> None:
    model = cut(llama())
    attach_view(model, "model.layers.0.mlp.up_proj.weight", METHODS["full"]().view(torch.zeros(64, 32), generator=torch.Generator()))
    with pytest.raises(Refused, match="export it first"):
        pruned_sites(model)
    packed = cut(llama())
    packed.config.quantization_config = {"quant_method": "rarefy"}
    with pytest.raises(Refused, match="dequantize"):
        pruned_sites(packed)


def test_no_windows_and_no_steps_are_refused() -> None:
    with pytest.raises(BadInput, match="no windows"):
        heal(cut(llama()), [], METHODS["spp"]())
    with pytest.raises(BadInput):
        Training(batch=0)


def test_only_pruned_matrices_that_one_module_owns_are_trained() -> None:
    model = cut(llama(tie_word_embeddings=True))
    with torch.no_grad():
        model.lm_head.weight[:5] = 0.0
        dense = model.model.layers[1].mlp.down_proj.weight.copy_(torch.ones(32, 64))
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    first.weight = second.weight
    untouched = (dense, second.weight)
    assert {s.key for s in pruned_sites(model)} == {k for k, p in model.named_parameters() if "layers." in k and p.dim() == 2 and all(p is not u for u in untouched)}


def test_only_lors_asks_for_the_gradient() -> None:
    assert [name for name, method in METHODS.items() if asks(method.view)] == ["lors"]


# -- the command line
WORDS = ("sparse", "networks", "choose", "what", "to", "keep", "and", "pay", "for", "every", "zero", "twice", "unless", "kernels", "skip", "them")


def write_text(path: Path, seed: int, words: int = 700) -> str:
    order = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    path.write_text(" ".join(WORDS[i] for i in order))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a letter tokenizer, pruned by the command line, and two texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from rarefy.cli.main import main

    root = tmp_path_factory.mktemp("heal")
    letters = {w: i for i, w in enumerate(["<s>", "<unk>", *(chr(c) for c in range(97, 123)), " "])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(root / "dense")
    llama(initializer_range=0.1).save_pretrained(root / "dense")
    train = write_text(root / "train.txt", 0)
    write_text(root / "held.txt", 1)
    pruned = ["prune", str(root / "dense"), "--recipe", "wanda", "--pattern", "2:4", "--calibration", train, "--calibration-tokens", "512", "--out", str(root / "half")]
    assert main([*pruned, "--json"]) == 0
    return root


def run(capsys: pytest.CaptureFixture[str], root: Path, *more: str) -> tuple[int, str, str]:
    from rarefy.cli.main import main

    texts = ("--train-text", str(root / "train.txt"), "--text", str(root / "held.txt"), "--eval-tokens", "1024")
    capsys.readouterr()
    code = main(["heal", str(root / "half"), *texts, *more])
    return code, *capsys.readouterr()


def saved(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("method", [*METHODS, "lors:rank=4,exact=True"])
def test_the_verb_heals_a_folder(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, method: str) -> None:
    more = ("--teacher", str(folder / "dense"), "--alpha", "0.3") if method == "spp" else ()
    code, out, err = run(capsys, folder, "--tokens", "2k", "--method", method, "--lr", "0.02", "--out", str(tmp_path / "healed"), "--json", *more)
    assert code == 0, err
    record = json.loads(out)
    assert record["loss_after"]["value"] < record["loss_before"]["value"] and record["method"] == method.partition(":")[0]
    for when in ("before", "after"):
        loss_, perplexity_ = record[f"loss_{when}"], record[f"perplexity_{when}"]
        assert perplexity_["value"] == pytest.approx(math.exp(loss_["value"]))
        assert loss_["interval"][0] <= loss_["value"] <= loss_["interval"][1] and perplexity_["interval"][0] == pytest.approx(math.exp(loss_["interval"][0]))
    assert record["tokens"] == record["steps"] * 128 == 2048 and record["zeros"]["lost"] == 0
    assert (record["teacher"] or {}).get("alpha") == (0.3 if more else None) and record["pruned"]["recipe"] == "wanda"
    before, after = saved(folder / "half"), saved(tmp_path / "healed")
    assert all(torch.equal(before[k] == 0, after[k] == 0) for k in before) and before.keys() == after.keys()
    assert not (tmp_path / "healed.partial").exists() and "2048 tokens" in (tmp_path / "healed" / "README.md").read_text()
    on_disk = json.loads((tmp_path / "healed" / "heal.json").read_text())
    assert {**on_disk, "out": 0} == {**record, "out": 0}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, after["model.layers.0.mlp.up_proj.weight"])
    schema = json.loads((Path(__file__).parent.parent / "docs" / "schema" / "heal.v1.json").read_text())
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema)
    assert [e.message for e in validator.iter_errors(record)] == []
    assert all(not validator.is_valid({k: v for k, v in record.items() if k != gone}) for gone in schema["required"])
    assert not validator.is_valid({**record, "zeros": {**record["zeros"], "lost": 1}})


def test_the_verb_goes_block_by_block_and_a_packed_folder_holds_the_same_weights(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rarefy.cli.main import main
    from rarefy.hub.load import load
    from rarefy.hub.packed import dequantize
    from rarefy.surgery import reconstruct

    command = ("--tokens", "1k", "--course", "by-block:epochs=1", "--method", "int4-weights", "--teacher", str(folder / "dense"), "--lr", "0.01")
    code, out, err = run(capsys, folder, *command, "--out", str(tmp_path / "whole"), "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["course"] == {"name": "by-block", "epochs": 1} and [b["name"] for b in record["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert all(b["after"] < b["before"] for b in record["blocks"]) and record["zeros"]["lost"] == 0
    schema = json.loads((Path(__file__).parent.parent / "docs" / "schema" / "heal.v1.json").read_text())
    assert pytest.importorskip("jsonschema").Draft202012Validator(schema).is_valid(record)
    real = reconstruct._Walk._fit

    def stop(walk: Any, index: int, *rest: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return real(walk, index, *rest)

    monkeypatch.setattr(reconstruct._Walk, "_fit", stop)
    code, _, err = run(capsys, folder, *command, "--out", str(tmp_path / "parts"))
    assert code == 130 and "1 of 2 blocks are kept" in err
    monkeypatch.undo()
    code, _, err = run(capsys, folder, *command, "--out", str(tmp_path / "parts"))
    assert code == 0 and "resumed after 1 of 2 blocks" in err
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert main(["pack", str(tmp_path / "whole"), "--layout", "int4-asymmetric", "--out", str(tmp_path / "packed")]) == 0
    again, kept = dequantize(load(tmp_path / "packed").model).state_dict(), saved(tmp_path / "whole")
    assert json.loads((tmp_path / "packed" / "pack.json").read_text())["packed"] == 14 and all(torch.equal(again[k], v) for k, v in kept.items())


def test_ctrl_c_keeps_the_checkpoint_and_the_same_command_ends_in_the_same_bytes(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--tokens", "2k", "--save-every", "4")
    assert run(capsys, folder, *command, "--out", str(tmp_path / "straight"))[0] == 0
    real = heal_module.descend

    def stop(*args: Any) -> float:
        if args[-1].step == 11:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(heal_module, "descend", stop)
    code, out, err = run(capsys, folder, *command, "--out", str(tmp_path / "stopped"))
    assert code == 130 and "8 of 16 steps are kept" in err and not (tmp_path / "stopped").exists()
    code, _, err = run(capsys, folder, *command, "--lr", "0.1", "--out", str(tmp_path / "stopped"))
    assert code == 5 and "another run" in err
    monkeypatch.undo()
    code, out, err = run(capsys, folder, *command, "--out", str(tmp_path / "stopped"))
    assert code == 0 and "resumed after 8 of 16 steps" in err and "0 of" in out
    assert (tmp_path / "stopped" / "model.safetensors").read_bytes() == (tmp_path / "straight" / "model.safetensors").read_bytes()
    assert not (tmp_path / "stopped.partial").exists()


def test_what_the_verb_refuses(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    from rarefy.hub.load import load
    from rarefy.hub.packed import save_packed

    held, shared = str(folder / "held.txt"), tmp_path / "shared.txt"
    shared.write_text((folder / "held.txt").read_text()[300:600] + (folder / "train.txt").read_text())
    loaded = load(folder / "half")
    save_packed(loaded.model, loaded.tokenizer, tmp_path / "packed")
    out = ("--out", str(tmp_path / "out"))
    cases = (
        (("--train-text", held, *out), 5, "cannot be held out"),
        (("--train-text", str(shared), "--tokens", "4k", *out), 5, " runs of 64 tokens"),
        (("--lr", "1e30", "--tokens", "2k", *out), 2, "at step"),
        (("--method", "none-such", *out), 2, "known are full, int4-scales, int4-weights, lors, masked-lora, spp"),
        (("--tokens", "many", *out), 2, "written like 50k"),
        (("--tokens", "10M", *out), 2, "are needed"),
        (("--alpha", "2", "--teacher", str(folder / "dense"), *out), 2, "alpha lies in [0, 1]"),
        (("--out", str(folder / "dense")), 5, "exists and is not empty"),
    )
    for arguments, wanted, words in cases:
        code, _, err = run(capsys, folder, *arguments)
        assert code == wanted and words in err and len(err.strip().splitlines()) == 1, (arguments, err)
        assert not (tmp_path / "out").exists()
    other = shutil.copytree(folder / "dense", tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"q": 18', '"Q": 18').replace('"q":18', '"Q":18'))
    assert "shares the student's vocabulary" in run(capsys, folder, "--teacher", str(other), *out)[2]
    for model, words in ((tmp_path / "packed", f"run rarefy unpack {tmp_path}/packed --out DIR first"), (folder / "dense", "prune it first")):
        from rarefy.cli.main import main

        assert main(["heal", str(model), *out]) == 5
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("broken", ["[", "3", "\xff"])
def test_a_damaged_record_of_prune_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = shutil.copytree(folder / "half", tmp_path / "half")
    (half / "prune.json").write_text(broken, encoding="latin-1")
    monkeypatch.setattr("rarefy.surgery.courses.EndToEnd.run", lambda *_, **__: pytest.fail("the work was begun"))
    from rarefy.cli.main import main

    assert main(["heal", str(half), "--out", str(tmp_path / "out"), "--train-text", str(folder / "train.txt"), "--text", str(folder / "held.txt"), "--tokens", "512"]) == 3
    assert "half/prune.json: it is not a record of prune" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_the_result_has_a_name_of_its_own(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert run(capsys, folder, "--tokens", "256", "--method", "full")[0] == 0
    assert (folder / "half-healed" / "heal.json").is_file()
    from rarefy.cli.main import main

    assert main(["heal", "owner/name"]) == 2
    assert "--out" in capsys.readouterr().err
