"""Gates: exact zeros in activations, and a folder that reloads them bit for bit, or raises."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rarefy.testing as contracts
from rarefy.activations.attach import attach_gates
from rarefy.activations.gates.threshold import Threshold
from rarefy.activations.gates.topk import TopK
from rarefy.core.attach import attach_gate, attach_view, detach, detach_gates, exported, gated, viewed
from rarefy.core.discover import methods
from rarefy.core.errors import BadFile, BadInput, Refused
from rarefy.core.roles import Gate, View
from rarefy.surgery.narrow import narrow

DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("gate", methods(Gate).values(), ids=methods(Gate))
def test_every_gate_keeps_its_contract(gate: type[Gate]) -> None:
    assert contracts.check(gate) > 0


class Leaky(TopK):
    """What it drops is small, not zero."""

    name = "leaky"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(self.keep(x), x, x * 1e-8)


class Straight(TopK):
    """The gradient passes everywhere."""

    name = "straight"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (super().forward(x) - x).detach()


class Drifting(Threshold):
    """The threshold follows what it sees."""

    name = "drifting"

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        found = super().keep(x)
        self.threshold += 0.01
        return found


class Miscounting(TopK):
    """One more than asked."""

    name = "miscounting"

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        return TopK(min(1.0, self.density + 0.1)).keep(x)


@pytest.mark.parametrize("broken", [Leaky, Straight, Drifting, Miscounting])
def test_the_contract_sees_a_broken_gate(broken: type[Gate]) -> None:
    with pytest.raises(AssertionError):
        contracts.check(broken)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_topk_is_exact_under_ties_and_keeps_the_lower_index(density: float) -> None:
    x = torch.tensor([[1.0, -1, 1, 1, -1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0], [3, 1, 1, 1, 1, 1, 1, 1, -3]])
    kept, count = TopK(density).keep(x), round(density * 9)
    assert kept.sum(-1).tolist() == [count] * 3
    assert kept[0].tolist() == [i < count for i in range(9)]
    if count == 4:
        assert kept[2].nonzero().flatten().tolist() == [0, 1, 2, 8]


def test_threshold_is_the_quantile_of_its_rows_and_no_parameter() -> None:
    rows = torch.randperm(1000).float().view(10, 100) + 1
    gate = Threshold(density=0.25)
    gate.calibrate(rows)
    assert float(gate.threshold) == 751 and int((gate(rows) != 0).sum()) == 250
    assert not list(gate.parameters()) and list(gate.state_dict()) == ["threshold"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Threshold(threshold=-0.1), "threshold -0.1"),
        (lambda: Threshold(threshold=float("nan")), "threshold nan"),
        (lambda: Threshold(threshold=1e300), "finite"),
        (lambda: Threshold(density=0.0), "density 0"),
        (lambda: TopK(1.5), "density 1.5"),
        (lambda: TopK(float("nan")), "density nan"),
        (lambda: Threshold(0.5).calibrate(torch.tensor([[float("nan")]])), "finite values"),
    ],
)
def test_bad_settings_are_one_sentence(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        make()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))


class Double(View):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def test_attaching_renames_no_key_and_detaching_restores_the_class() -> None:
    model, x = mlp(), torch.randn(3, 6)
    keys, dense = list(model.state_dict()), model(x)
    attach_gate(model, "2", TopK())
    assert torch.equal(model(x), dense) and list(model.state_dict()) == keys
    detach_gates(model)
    attach_gate(model, "2", Threshold(threshold=0.4))
    hidden = torch.relu(model[0](x))  # type: ignore[index]
    assert torch.equal(model(x), nn.functional.linear(torch.where(hidden < 0.4, 0, hidden), model[2].weight, model[2].bias))  # type: ignore[index]
    assert set(model.state_dict()) - set(keys) == {"2.rarefy_input.threshold"}
    with pytest.raises(Refused, match="one gate"):
        attach_gate(model, "2", TopK())
    again = copy.deepcopy(model)
    gated(again)["2"].threshold.fill_(9)  # type: ignore[union-attr, operator]
    assert float(gated(model)["2"].threshold) == pytest.approx(0.4) and not torch.equal(again(x), model(x))  # type: ignore[arg-type]
    fresh = mlp()
    attach_gate(fresh, "2", Threshold())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    detach_gates(model)
    assert type(model[2]) is nn.Linear and torch.equal(model(x), dense)  # type: ignore[index]


@pytest.mark.parametrize("first", ["gate", "view"])
def test_gate_and_view_share_a_host(first: str) -> None:
    model, x = mlp(), torch.randn(3, 6)
    steps = [lambda: attach_gate(model, "2", TopK(0.5)), lambda: attach_view(model, "2.weight", Double())]
    for step in steps if first == "gate" else reversed(steps):
        step()
    hidden = TopK(0.5)(torch.relu(model[0](x)))  # type: ignore[index]
    weight, bias = model[2].weight, model[2].bias  # type: ignore[index]
    assert torch.equal(model(x), nn.functional.linear(hidden, weight * 2, bias))
    detach(model)
    assert not viewed(model) and torch.equal(model(x), nn.functional.linear(hidden, weight, bias))
    with pytest.raises(Refused, match="plain model cannot"), exported(model):
        pass
    detach_gates(model)
    assert type(model[2]) is nn.Linear  # type: ignore[index]


def test_a_shared_weight_is_gated_at_one_host_only() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    attach_gate(model, "1", TopK(0.4))
    x = torch.randn(2, 5)
    assert torch.equal(model(x), nn.functional.linear(TopK(0.4)(model[0](x)), model[0].weight, model[1].bias))


@pytest.mark.parametrize("gate", [TopK(0.5), Threshold(threshold=0.2)], ids=["topk", "threshold"])
def test_fullgraph_compile_gives_the_eager_result(gate: Gate) -> None:
    model, x = mlp(), torch.randn(3, 6)
    attach_gate(model, "2", gate)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_training_resumes_through_a_gate() -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = mlp()
        attach_gate(model, "2", Threshold(threshold=0.2))
        return model, torch.optim.Adam(model.parameters(), 1e-2)

    straight, optimizer = make()
    train(straight, optimizer, range(6))
    half, optimizer = make()
    train(half, optimizer, range(3))
    resumed, other = make()
    resumed.load_state_dict(half.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train(resumed, other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True))


transformers = pytest.importorskip("transformers")
from rarefy.hub.export import save_dense  # noqa: E402
from rarefy.hub.load import load  # noqa: E402
from rarefy.hub.packed import Packed, dequantize, save_packed  # noqa: E402
from tests.test_format import HOSTILE, IDS, gpt2, llama, logits, plan  # noqa: E402

GATE_GOLDEN = Path(__file__).parent / "golden" / "gates-v1"
BATCHES = [{"input_ids": torch.arange(60).view(2, 30), "attention_mask": torch.ones(2, 30, dtype=torch.long)}]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back is compared bit for bit; native kernels add in another order, see tests/test_packed_native.py."""
    monkeypatch.setenv("RAREFY_NATIVE", "off")


def gated_llama(gate: Gate, dtype: torch.dtype = torch.float32) -> Any:
    model = llama(dtype)
    attach_gates(model, gate, ["*.mlp.down_proj"], BATCHES)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [TopK(0.3), Threshold(density=0.3)], ids=["topk", "threshold"])
def test_a_gated_folder_reloads_bit_for_bit(tmp_path: Path, gate: Gate, dtype: torch.dtype) -> None:
    model = gated_llama(gate, dtype)
    before = logits(model)
    assert not torch.equal(before, logits(llama(dtype)))
    record = save_packed(model, None, tmp_path / "out")
    assert torch.equal(logits(model), before) and [g["name"] for g in record["gates"]] == [DOWN]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert list(gated(again)) == [DOWN] and torch.equal(logits(again), before)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert torch.equal(logits(load(tmp_path / "again").model), before)


ALONE = """
import sys, transformers
for folder in sys.argv[1:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        print("raised", type(error).__name__, "weight" in str(error) or "size" in str(error))
    else:
        print("loaded", folder)
"""


def test_transformers_without_rarefy_raises_on_every_kind_of_folder(tmp_path: Path) -> None:
    golden = [Path(__file__).parent / "golden" / name / "model" for name in ("v1", "gates-v1", "narrow-v1")]
    dense = transformers.LlamaForCausalLM(llama().config).eval()
    attach_gates(dense, TopK(0.5), ["*.mlp.down_proj"])
    record = save_packed(dense, None, tmp_path / "gate-only")
    assert record["packed"] == 1 and {s["layout"] for s in record["sites"]} == {None, "flat"}
    assert torch.equal(logits(load(tmp_path / "gate-only").model), logits(dense))
    conv = gpt2()
    attach_gates(conv, TopK(0.5), ["*.mlp.c_proj"])
    save_packed(conv, None, tmp_path / "conv")
    narrowed = transformers.LlamaForCausalLM(llama().config).eval()
    assert save_packed(narrow(narrowed, {"model.layers.0.mlp": [1, 2, 3]}), None, tmp_path / "narrow-only")["packed"] == 0
    llama().save_pretrained(tmp_path / "plain")
    folders = [str(f) for f in (*golden, tmp_path / "gate-only", tmp_path / "conv", tmp_path / "narrow-only", tmp_path / "plain")]
    done = subprocess.run([sys.executable, "-c", ALONE, *folders], capture_output=True, text=True, check=True)
    *packed, plain = done.stdout.strip().splitlines()
    assert packed == ["raised RuntimeError True"] * 6 and plain == f"loaded {folders[-1]}"
    assert done.stderr.count("got rarefy (pip install rarefy, then import rarefy)") == 3  # golden folders have the bare name
    for folder in folders[3:6]:
        assert "pip install 'rarefy[hub]'" in (Path(folder) / "README.md").read_text()


def test_the_threshold_is_the_plans_in_the_dtype_that_was_asked(tmp_path: Path) -> None:
    save_packed(gated_llama(Threshold(density=0.3)), None, tmp_path / "out")
    model = load(tmp_path / "out", dtype="bf16").model
    assert gated(model)[DOWN](torch.ones(2, 27, dtype=torch.bfloat16)).dtype == torch.bfloat16 and logits(model).isfinite().all()
    with pytest.raises(Refused, match="value or dtype"):
        model.save_pretrained(tmp_path / "again")


def reloaded(folder: Path) -> Any:
    save_packed(gated_llama(Threshold(density=0.3)), None, folder)
    return load(folder).model


def _raise_threshold(model: Any) -> None:
    gated(model)[DOWN].threshold.add_(0.1)  # type: ignore[union-attr, operator]


def _train_norm(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.add_(0.1)


def _replace_layer(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.up_proj = nn.Linear(16, 27, bias=False)


def _flip_packed(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight[70] ^= 1


DIFFERENT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "gate detached": (detach_gates, f"gate on {DOWN}"),
    "gate added": (lambda m: attach_gate(m, "model.layers.0.mlp.gate_proj", TopK(0.5)), "gate on model.layers.0.mlp.gate_proj"),
    "gate moved": (_raise_threshold, f"gate on {DOWN}"),
    "tensor changed": (_train_norm, "model.norm.weight"),
    "layer replaced": (_replace_layer, "up_proj"),
    "layer changed": (_flip_packed, "up_proj"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_save_refuses_a_model_that_differs_from_its_plan(tmp_path: Path, case: str) -> None:
    model = reloaded(tmp_path / "out")
    change, words = DIFFERENT[case]
    change(model)
    with pytest.raises(Refused, match=words):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors").exists()


def test_a_plain_folder_of_a_gated_or_narrow_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="would run dense"):
        save_dense(gated_llama(TopK(0.5)), None, tmp_path / "gated")
    with pytest.raises(Refused, match="narrow"):
        save_dense(narrow(llama(), {"model.layers.0.mlp": [0, 1]}), None, tmp_path / "narrow")
    assert not list(tmp_path.iterdir())


def test_save_pretrained_never_leaves_a_gate_out(tmp_path: Path) -> None:
    model = llama()
    attach_gates(model, TopK(0.5), ["*.mlp.down_proj"])
    for holder in (model, model.model, copy.deepcopy(model)):
        with pytest.raises(Refused, match=r"the gate on .*save_pretrained would leave it out, and the folder would run dense"):
            holder.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_packed(model, None, tmp_path / "packed")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    again.save_pretrained(tmp_path / "again")  # its config holds the plan
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "packed" / "config.json").read_bytes()
    detach_gates(model)
    assert "save_pretrained" not in {**model.__dict__, **model.model.__dict__}
    model.save_pretrained(tmp_path / "plain")


def test_dequantize_refuses_gates_until_they_are_off(tmp_path: Path) -> None:
    model = reloaded(tmp_path / "out")
    with pytest.raises(Refused, match="would run dense"):
        dequantize(model)
    detach_gates(model)
    dequantize(model).save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(load(tmp_path / "dense").model), logits(llama()))


def test_a_gate_on_a_shared_or_foreign_module_is_refused(tmp_path: Path) -> None:
    tied = llama()
    attach_gate(tied, "lm_head", TopK(0.5))
    with pytest.raises(Refused, match="shared"):
        save_packed(tied, None, tmp_path / "out")
    norm = llama()
    attach_gate(norm, "model.norm", TopK(0.5))
    with pytest.raises(Refused, match="LlamaRMSNorm"):
        save_packed(norm, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_attaching_by_glob_is_calibrated_or_refused() -> None:
    model = llama()
    with pytest.raises(BadInput, match="open until it is calibrated"):
        attach_gates(model, Threshold(density=0.5), ["*.down_proj"])
    with pytest.raises(BadInput, match="no Linear"):
        attach_gates(model, TopK(0.5), ["*.nowhere"])
    kept = attach_gates(model, Threshold(density=0.25), ["*.down_proj", "*.o_proj"], BATCHES)
    assert list(kept) == ["model.layers.0.self_attn.o_proj", DOWN] and all(v == pytest.approx(0.25, abs=1e-3) for v in kept.values())


def test_padding_does_not_calibrate() -> None:
    padded = {"input_ids": torch.cat([BATCHES[0]["input_ids"], torch.full((2, 30), 60)], 1), "attention_mask": torch.cat([torch.ones(2, 30), torch.zeros(2, 30)], 1).long()}
    first, second = llama(), llama()
    attach_gates(first, Threshold(density=0.3), ["*.down_proj"], BATCHES)
    attach_gates(second, Threshold(density=0.3), ["*.down_proj"], [padded])
    assert gated(first)[DOWN].settings()["threshold"] == pytest.approx(gated(second)[DOWN].settings()["threshold"], rel=1e-5)


def seal(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the plan and make its own checksum right, as one who knows the format would."""
    from rarefy.hub.plan import _digest_of

    def sealed(fields: dict[str, Any]) -> None:
        edit(fields)
        fields["sha256"] = _digest_of({k: v for k, v in fields.items() if k not in ("sha256", "quant_method")})

    plan(folder, sealed)


def gate_entry(**settings: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda q: q["gates"][DOWN]["settings"].update(settings)


def twice(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"vocab_size"', '"vocab_size": 61, "vocab_size"'))


def traverse(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    keys = json.loads((folder / "config.json").read_text())["quantization_config"]
    names = [*keys["tensors"], *(f"{p}.weight" for p in keys["layers"])]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}))


def flip_dense(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little")
    data[8 + header + json.loads(data[8 : 8 + header])["model.norm.weight"]["data_offsets"][0]] ^= 1
    file.write_bytes(data)


def header(folder: Path, old: str, new: str) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].replace(old.encode(), new.encode(), 1)
    assert text != data[8 : 8 + length]
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


GATE_HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tampered": (lambda f: plan(f, gate_entry(threshold=0.5)), "sha256 is not that of its own fields"),
    "no checksum": (lambda f: plan(f, lambda q: q.pop("sha256")), "no sha256 of itself"),
    "unknown gate": (lambda f: seal(f, lambda q: q["gates"][DOWN].update(gate="sieve")), "known gates are channel-threshold, straight-topk, threshold, topk"),
    "negative threshold": (lambda f: seal(f, gate_entry(threshold=-0.5)), "threshold -0.5 of the gate"),
    "nan threshold": (lambda f: seal(f, gate_entry(threshold=float("nan"))), "finite numbers"),
    "text threshold": (lambda f: seal(f, gate_entry(threshold="0.1")), "finite numbers"),
    "boolean threshold": (lambda f: seal(f, gate_entry(threshold=True)), "finite numbers"),
    "unknown setting": (lambda f: seal(f, gate_entry(hook="os.system")), "finite numbers for density, threshold"),
    "another threshold": (lambda f: seal(f, gate_entry(threshold=0.5)), "not those of the plan's settings"),
    "gate on dense": (lambda f: seal(f, lambda q: q["gates"].update({"model.layers.0.mlp.gate_proj": q["gates"][DOWN]})), "stored packed"),
    "gate dropped": (lambda f: seal(f, lambda q: q["gates"].clear()), "sha256|tensor model.layers.0.mlp.down_proj.rarefy_input.threshold"),
    "traversal in a name": (lambda f: seal(f, lambda q: q["layers"].update({"../../etc/passwd": q["layers"][DOWN]})), "letters, digits"),
    "traversal in the index": (traverse, "'../elsewhere.safetensors', which is not a safetensors file of this folder"),
    "key twice": (twice, "'vocab_size' twice"),
    "no tensors": (lambda f: seal(f, lambda q: q["tensors"].clear()), "a sha256 of every tensor"),
    "tensor left out": (lambda f: seal(f, lambda q: q["tensors"].pop("model.norm.weight")), "in the files and not in the plan"),
    "unknown field": (lambda f: seal(f, lambda q: q.update(hook="x")), "'hook'"),
    "list of gates": (lambda f: seal(f, lambda q: q.update(gates=[])), "gates must be a mapping"),
    "huge shape": (lambda f: seal(f, lambda q: q["layers"][DOWN].update(shape=[2**30, 2**30])), f"bytes|shape [{2**30}, {2**30}]"),
    "dense tensor flipped": (flip_dense, "tensor model.norm.weight: its sha256, dtype or shape"),
    "dtype of a dense tensor": (lambda f: header(f, '"F32","shape":[16]', '"I32","shape":[16]'), "sha256, dtype or shape"),
    "tensor twice": (lambda f: header(f, '"model.norm.weight":', '"lm_weight":1,"lm_weight":'), "'lm_weight' twice"),
    "version": (lambda f: seal(f, lambda q: q.update(version=True)), "version True"),
}


@pytest.mark.parametrize("case", GATE_HOSTILE)
def test_hostile_gated_folder_is_one_sentence_and_code_3(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rarefy.cli.main import main

    damage, words = GATE_HOSTILE[case]
    folder = tmp_path / "m"
    shutil.copytree(GATE_GOLDEN / "model", folder)
    damage(folder)
    with pytest.raises(BadFile) as caught:
        load(folder)
    assert any(w in str(caught.value) for w in words.split("|")) and "\n" not in str(caught.value)
    capsys.readouterr()
    assert main(["eval", str(folder)]) == 3
    shown = capsys.readouterr().err
    assert "Traceback" not in shown and shown.strip().splitlines()[-1] == f"error: {caught.value}"


@pytest.mark.parametrize("case", HOSTILE)
def test_eval_of_a_hostile_packed_folder_exits_with_3(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rarefy.cli.main import main

    folder = tmp_path / "m"
    shutil.copytree(Path(__file__).parent / "golden" / "v1" / "model", folder)
    HOSTILE[case][0](folder)
    assert main(["eval", str(folder)]) == 3
    shown = capsys.readouterr().err
    assert "Traceback" not in shown and HOSTILE[case][1] in shown


def test_golden_gated_folder_loads() -> None:
    from safetensors.torch import load_file

    model = load(GATE_GOLDEN / "model").model
    expected = load_file(GATE_GOLDEN / "expected" / "logits.safetensors")["logits"]
    assert isinstance(model.get_submodule(DOWN), Packed) and list(gated(model)) == [DOWN]
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert IDS.shape == expected.shape[:2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.test_cli_schema import model_folder

    return model_folder(tmp_path_factory.mktemp("gates") / "tiny")


def test_a_user_reaches_gates_from_the_command_line(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rarefy.cli.main import main

    text = ["--calibration", f"{tiny}/text.txt", "--calibration-tokens", "512"]
    command = ["pack", tiny, "--gate", "threshold:density=0.25", "--gate-at", "*.mlp.*_proj", *text, "--json"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [g["name"].rpartition(".")[2] for g in record["gates"]] == ["gate_proj", "up_proj", "down_proj"]
    assert all(g["settings"]["threshold"] > 0 for g in record["gates"])
    assert record["gating"]["density_requested"] == 0.25 and record["gating"]["ledger"]["tokens"] == 256  # half of the only window
    model = load(tmp_path / "out").model
    assert [g.settings() for g in gated(model).values()] == [g["settings"] for g in record["gates"]]
    assert main(["eval", str(tmp_path / "out"), "--text", f"{tiny}/text.txt", "--tokens", "1024"]) == 0
    assert main([*command, "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_gates_put_on_by_hand_are_measured_on_windows_that_they_have_not_seen(two: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rarefy.cli.main import main
    from rarefy.hub.text import calibration_batches

    text = ["--calibration", f"{two}/text.txt", "--calibration-tokens", "2048"]
    assert main(["pack", two, "--gate", "threshold:density=0.25", "--gate-at", "*.down_proj", *text, "--json", "--out", str(tmp_path / "out")]) == 0
    record = json.loads(capsys.readouterr().out)
    loaded = load(tmp_path / "out")
    *seen, heldout = calibration_batches(loaded.tokenizer, 2048, 512, 0, f"{two}/text.txt")
    assert len(seen) == 3

    def densities(batches: list[Any]) -> list[float]:
        found: dict[str, list[torch.Tensor]] = {place: [] for place in gated(loaded.model)}
        hooks = [gate.register_forward_hook(lambda *a, place=place: found[place].append(a[2] != 0)) for place, gate in gated(loaded.model).items()]
        with torch.no_grad():
            for batch in batches:
                loaded.model(**batch)
        for hook in hooks:
            hook.remove()
        return [float(torch.cat([part.reshape(-1) for part in parts]).double().mean()) for parts in found.values()]

    reported = [gate["density"] for gate in record["gates"]]
    assert reported == pytest.approx(densities([heldout]), abs=1e-9)
    assert densities(seen) == pytest.approx([0.25, 0.25], abs=0.01) and reported != pytest.approx(densities(seen), abs=1e-6)
    assert main(["pack", two, "--gate", "threshold:density=0.25", "--gate-at", "*.down_proj", *text, "--out", str(tmp_path / "drawn")]) == 0
    drawn = capsys.readouterr().out
    assert "│ threshold │ model.layers.mlp.down_proj │ 2 │" in drawn and "where 0.25 was asked, measured on 512 held-out tokens" in drawn


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("sieve", "known are channel-threshold, straight-topk, threshold, topk"),
        ("topk:k=3", "has the fields density"),
        ("topk:density=2", "density 2"),
        ("threshold:threshold=-1", "finite float32"),
        ("topk:density=half", "a value of the wrong kind"),
    ],
)
def test_a_wrong_gate_is_exit_2_and_one_line(tiny: str, tmp_path: Path, gate: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rarefy.cli.main import main

    assert main(["pack", tiny, "--gate", gate, "--gate-at", "*.mlp.down_proj", "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_gate_without_a_place_is_refused(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rarefy.cli.main import main

    assert main(["pack", tiny, "--gate", "topk", "--out", str(tmp_path / "out")]) == 2 and "--gate-at" in capsys.readouterr().err


ACT = "model.layers.0.mlp.act_fn"


def test_an_output_is_gated_beside_an_input_and_both_come_off() -> None:
    model, x = mlp(), torch.randn(3, 6)
    keys, dense = list(model.state_dict()), model(x)
    attach_gate(model, "1:output", TopK(0.3))
    attach_gate(model, "1", Threshold(threshold=0.1))
    hidden = TopK(0.3)(torch.relu(Threshold(threshold=0.1)(model[0](x))))  # type: ignore[index]
    assert torch.equal(model(x), model[2](hidden)) and list(gated(model)) == ["1", "1:output"]  # type: ignore[index]
    assert set(model.state_dict()) - set(keys) == {"1.rarefy_input.threshold"}
    with pytest.raises(Refused, match="one gate"):
        attach_gate(model, "1:output", TopK())
    again = detach_gates(model)
    assert type(model[1]) is nn.ReLU and torch.equal(model(x), dense)  # type: ignore[index]
    for place, gate in again.items():
        attach_gate(model, place, gate)
    assert torch.equal(model(x), model[2](hidden))  # type: ignore[index]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("name", ["cats", "chess", "lazy-neuron", "q-sparse", "teal"])
def test_every_gating_reloads_bit_for_bit(tmp_path: Path, name: str) -> None:
    from rarefy.activations.apply import apply_gating
    from rarefy.cli.names import gating

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**llama().config.to_dict(), "num_hidden_layers": 2})).eval()
    record = apply_gating(model, gating(f"{name}:density=0.5"), BATCHES, BATCHES)
    before = logits(model)
    saved = save_packed(model, None, tmp_path / "out", gating=record)
    assert saved["gating"] == json.loads((tmp_path / "out" / "pack.json").read_text())["gating"] == record
    again = load(tmp_path / "out").model
    assert torch.equal(logits(again), before) and list(gated(again)) == list(gated(model))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def output_gated(folder: Path) -> Path:
    from rarefy.activations.gates.channel_threshold import ChannelThreshold

    model = llama()
    gate = ChannelThreshold(0.5)
    gate.calibrate(torch.randn(50, 27))
    attach_gate(model, ACT + ":output", gate)
    save_packed(model, None, folder)
    return folder


def _one_of(q: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = q["gates"][ACT + ":output"]["settings"]
    return found


OUTPUT_HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing packed beside": (lambda f: seal(f, lambda q: [q["layers"].pop(p) for p in list(q["layers"]) if ".mlp." in p]), "beside a gated output"),
    "another end": (lambda f: seal(f, lambda q: q["gates"].update({ACT + ":input": q["gates"].pop(ACT + ":output")})), "letters, digits"),
    "no such module": (lambda f: seal(f, lambda q: q["gates"].update({"model.layers.0.mlp.act:output": q["gates"].pop(ACT + ":output")})), "model.layers.0.mlp.act"),
    "other channels": (lambda f: seal(f, lambda q: _one_of(q).update(channels=26)), "rarefy_output.threshold"),
    "huge channels": (lambda f: seal(f, lambda q: _one_of(q).update(channels=2**40)), "channels"),
    "half a channel": (lambda f: seal(f, lambda q: _one_of(q).update(channels=1.5)), "channels 1.5"),
}


@pytest.mark.parametrize("case", OUTPUT_HOSTILE)
def test_a_hostile_output_gate_is_refused(tmp_path: Path, case: str) -> None:
    damage, words = OUTPUT_HOSTILE[case]
    folder = output_gated(tmp_path / "m")
    load(folder)
    damage(folder)
    with pytest.raises(BadFile, match=words):
        load(folder)


def test_the_layers_beside_a_gated_output_are_packed_and_a_lone_one_is_refused(tmp_path: Path) -> None:
    plan_ = json.loads((output_gated(tmp_path / "m") / "config.json").read_text())["quantization_config"]
    assert {p.rpartition(".")[2] for p in plan_["layers"]} == {"gate_proj", "up_proj", "down_proj"}
    model = load(tmp_path / "m").model
    model.model.layers[0].mlp.act_fn.rarefy_output.threshold.mul_(2)
    with pytest.raises(Refused, match="value or dtype"):
        model.save_pretrained(tmp_path / "again")
    norm = llama()
    attach_gate(norm, "model.norm:output", TopK(0.5))
    with pytest.raises(Refused, match="lies beside it"):
        save_packed(norm, None, tmp_path / "norm")


@pytest.fixture(scope="module")
def two(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """As `tiny`, with two blocks."""
    folder = tmp_path_factory.mktemp("gates") / "two"
    shutil.copytree(tiny, folder)
    config = transformers.AutoConfig.from_pretrained(tiny)
    config.num_hidden_layers, config.layer_types = 2, None
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["cats", "teal"])
def test_a_gating_is_reached_from_the_command_line(two: str, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    import jsonschema

    from rarefy.cli.main import main

    tiny = two
    text = ["--calibration", f"{tiny}/text.txt", "--calibration-tokens", "2048"]
    assert main(["pack", tiny, "--gates", f"{name}:density=50%", *text, "--json", "--out", str(tmp_path / "out")]) == 0
    record = json.loads(capsys.readouterr().out)
    jsonschema.validate(record, json.loads((Path(__file__).parent.parent / "docs" / "schema" / "pack.v1.json").read_text()))
    assert record["gating"]["density"] == pytest.approx(0.5, abs=0.05) and record["gating"]["ledger"]["mac_density"] < 1
    assert [g["density"] for g in record["gates"]] == [{r["name"]: r["density"] for r in record["gating"]["gates"]}[g["name"]] for g in record["gates"]]
    assert main(["eval", str(tmp_path / "out"), "--text", f"{tiny}/text.txt", "--tokens", "1024", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1
    assert main(["pack", tiny, "--gates", name, *text, "--out", str(tmp_path / "drawn")]) == 0
    assert "held-out tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--gates", "sieve"], "known are cats, chess"),
        (["--gates", "teal:step=1"], "field density"),
        (["--gates", "teal:density=0"], "above 0"),
        (["--gates", "teal:density=x"], "a share is a number"),
        (["--gates", "teal", "--gate", "topk", "--gate-at", "*"], "one way"),
    ],
)
def test_a_wrong_gating_is_exit_2_and_one_line(tiny: str, tmp_path: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rarefy.cli.main import main

    assert main(["pack", tiny, *more, "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") == 1 and not (tmp_path / "out").exists()
