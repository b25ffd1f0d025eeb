"""The card of every kind of folder, as the Hub reads it; and folders and models pushed to a Hub that only writes down what it was given."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rarefy.cli.main import main
from rarefy.core.errors import BadFile, Refused
from rarefy.hub.card import front_matter, origin
from rarefy.hub.load import load
from rarefy.hub.push import push, uploads
from tests.test_cli import tiny

__all__ = ["tiny"]
transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def folders(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base with a card of its own, and what the verbs make of it, each of the one before."""
    root = tmp_path_factory.mktemp("cards")
    base = root / "base"
    load(tiny).model.save_pretrained(base)
    load(tiny).tokenizer.save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: some-licence\nlicense_link: https://example.org/licence\ntags:\n- chat\n---\n# Base\n\n1. Not a step.\n")
    data = ["--calibration", f"{tiny}/text.txt", "--calibration-tokens", "512"]
    healing = ["--train-text", str(root / "train.txt"), "--text", f"{tiny}/text.txt", "--tokens", "64", "--eval-tokens", "2048"]
    (root / "train.txt").write_text("a quite different text is what is trained on here " * 60)
    commands = {
        "pruned": ["prune", str(base), "--recipe", "wanda", "--density", "0.5", *data],
        "healed": ["heal", str(root / "pruned"), *healing],
        "packed": ["pack", str(root / "healed"), "--layout", "int8", "--gate", "threshold:density=0.5", "--gate-at", "*.mlp.down_proj", *data],
        "unpacked": ["unpack", str(root / "packed"), "--drop-gates"],
    }
    for name, argv in commands.items():
        assert main([*argv, "--out", str(root / name), "--json"]) == 0, name
    return {name: root / name for name in ("base", *commands)}


@pytest.mark.parametrize("kind", ["pruned", "healed", "packed", "unpacked"])
def test_the_front_matter_is_what_the_hub_reads(folders: dict[str, Path], kind: str) -> None:
    card = huggingface_hub.ModelCard.load(folders[kind] / "README.md")
    fields = card.data.to_dict()
    assert fields["tags"] == ["rarefy", kind] and fields["pipeline_tag"] == "text-generation"
    assert fields["library_name"] == ("rarefy" if kind == "packed" else "transformers")
    assert (fields["license"], fields["license_name"], fields["license_link"]) == ("other", "some-licence", "https://example.org/licence")
    assert "base_model" not in fields, "the base lies in a folder, and a folder's name is no repository's"


def test_the_steps_of_every_folder_before_are_listed(folders: dict[str, Path]) -> None:
    text = (folders["unpacked"] / "README.md").read_text()
    steps = [line for line in text.splitlines() if line[:2] in ("1.", "2.", "3.", "4.", "5.")]
    assert [step.split()[:2] for step in steps] == [["1.", "Pruned"], ["2.", "Healed"], ["3.", "14"], ["4.", "14"]]
    assert "recipe `wanda`" in steps[0] and "50.0000%" in steps[0] and "method `spp`" in steps[1] and "layout `int8`, 2 activation gates" in steps[2] and "left out" in steps[3]


def test_figures_are_those_of_the_records_with_their_protocol(folders: dict[str, Path]) -> None:
    healed, packed = (json.loads((folders[kind] / f"{file}.json").read_text()) for kind, file in (("healed", "heal"), ("packed", "pack")))
    text = (folders["healed"] / "README.md").read_text()
    for when in ("before", "after"):
        assert f"| perplexity {when} healing | {healed[f'perplexity_{when}']['value']:.3f} (95%: " in text
    assert f"on {healed['text']['held_out_tokens']} held-out tokens" in text
    text = (folders["packed"] / "README.md").read_text()
    assert f"| {packed['bytes_stored']:,} | stored, of {packed['bytes_dense']:,} dense" in text
    assert f"| {packed['gating']['density']:.2%} |" in text and "import rarefy" in text
    size = (folders["packed"] / "model.safetensors").stat().st_size
    assert f"`model.safetensors`: {size:,} bytes." in text
    assert "import rarefy" not in (folders["unpacked"] / "README.md").read_text()


def test_the_code_of_the_card_loads_the_folder(folders: dict[str, Path]) -> None:
    import re

    for kind in ("pruned", "packed"):
        (code,) = re.findall(r"```python\n(.*?)```", (folders[kind] / "README.md").read_text(), re.DOTALL)
        scope: dict[str, Any] = {"FOLDER": str(folders[kind])}
        exec(code, scope)
        assert scope["model"].config.hidden_size == 32


def test_a_base_on_the_hub_is_named_and_a_licence_in_a_config_counts() -> None:
    model = SimpleNamespace(config=SimpleNamespace(license="mit"))
    found = origin("acme/tiny@v2", model)  # not in the cache, and the Hub cannot be reached from the tests
    assert (found.hub, found.licence, found.steps) == ("acme/tiny", (("license", "mit"),), ())
    assert origin("", model).name == "SimpleNamespace" and origin("", model).hub is None


@pytest.mark.parametrize("text", ["---\n: [\n---\n", "---\n- a\n---\n", "no dashes", ""])
def test_a_card_that_is_none_says_nothing(text: str) -> None:
    assert front_matter(text) == {}


class Hub:
    """Stands for huggingface_hub.HfApi: keeps what it was given."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def create_repo(self, name: str, **options: Any) -> Any:
        self.made = name, options
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str) -> Any:
        self.files = {name: (Path(folder_path) / name).read_bytes() for name in allow_patterns}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    def create_commit(self, *, operations: list[Any], **options: Any) -> str:
        self.files = {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}
        return "done"


def test_a_folder_is_pushed_as_it_lies(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **options: hub)
    assert main(["push", str(folders["packed"]), "half", "--private", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(printed, json.loads((Path(__file__).parent.parent / "docs" / "schema" / "push.v1.json").read_text()))
    assert hub.made == ("half", {"private": True, "exist_ok": True}) and printed["repository"] == "me/half"
    assert set(hub.files) == {file.name for file in folders["packed"].iterdir()} >= {"README.md", "config.json", "model.safetensors", "pack.json", "tokenizer.json"}
    assert {file["name"]: file["bytes"] for file in printed["files"]} == {name: len(data) for name, data in hub.files.items()}


def test_what_may_run_code_is_not_pushed(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folders["packed"], tmp_path / "copy")
    (tmp_path / "copy" / "pytorch_model.bin").write_bytes(b"x")
    hub = Hub()
    with pytest.raises(Refused, match="pytorch_model"):
        push(tmp_path / "copy", "me/copy", api=hub)
    (tmp_path / "copy" / "pytorch_model.bin").unlink()
    (tmp_path / "copy" / "README.md").unlink()
    with pytest.raises(Refused, match=r"README\.md"):
        push(tmp_path / "copy", "me/copy", api=hub)
    with pytest.raises(BadFile, match=r"config\.json"):
        uploads(tmp_path)
    assert not hub.files and not hasattr(hub, "made")


def test_a_hub_that_cannot_be_reached_is_one_sentence(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(folders["pruned"]), "me/half"]) == 5
    said = capsys.readouterr().err
    assert said.startswith("error: me/half was not written: ") and said.count("\n") == 1


def test_push_to_hub_of_a_packed_model_uploads_files_that_load(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own way: the same weights and plan; the card is the one that lies on the Hub already, so that `rarefy push` goes first."""
    hub = Hub()
    ours = huggingface_hub.ModelCard.load(folders["packed"] / "README.md")
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: hub)
    monkeypatch.setattr(transformers.utils.hub.ModelCard, "load", lambda *args, **options: ours)
    load(folders["packed"]).model.push_to_hub("me/half")
    assert set(hub.files) >= {"README.md", "config.json", "model.safetensors"} and not [name for name in hub.files if name.endswith((".bin", ".pt", ".pkl"))]
    for name in ("config.json", "model.safetensors", "README.md"):
        assert hub.files[name].strip() == (folders["packed"] / name).read_bytes().strip(), name
