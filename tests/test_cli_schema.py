"""`--json` is a public contract: what each verb prints is valid under its committed schema, and the schemas refuse what breaks it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy.cli.main import main
from rarefy.hub.cache import cached_folder
from rarefy.kernels.library import native

jsonschema = pytest.importorskip("jsonschema")
transformers = pytest.importorskip("transformers")
SCHEMAS = Path(__file__).parent.parent / "docs" / "schema"
VERBS = (
    "prune",
    "pack",
    "eval",
    "generate",
    "compare",
    "optimize",
    "catalogue",
    "train",
    "methods",
    "cache",
    "report",
    "bench",
    "bench experts",
    "bench decode",
    "optimize for speed",
    "optimize and heal",
)


def model_folder(folder: Path) -> str:
    """A random Llama with a letter tokenizer and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {w: i for i, w in enumerate(["<s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 1024}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(letters), **sizes)).save_pretrained(folder)
    (folder / "text.txt").write_text("sparse networks choose what to keep " * 200)
    return str(folder)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """{verb: the document it prints}, every verb run once."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("schema")
    patch = pytest.MonkeyPatch()
    patch.setenv("RAREFY_CACHE", str(folder / "cache"))
    tiny = model_folder(folder / "tiny")
    calibration, text = ["--calibration", f"{tiny}/text.txt", "--calibration-tokens", "512"], ["--text", f"{tiny}/text.txt", "--tokens", "1024"]
    commands = {
        "prune": [tiny, "--out", str(folder / "half"), *calibration],
        "pack": [tiny, "--out", str(folder / "packed"), "--gate", "threshold:density=0.5", "--gate-at", "*.mlp.down_proj", *calibration],
        "unpack": [str(folder / "packed"), "--drop-gates", "--out", str(folder / "unpacked")],
        "eval": [tiny, *text],
        "generate": [tiny, "--prompt", "sparse", "--tokens", "3", "--runs", "1"],
        "compare": [tiny, "--recipes", "magnitude", "--patterns", "default,2:4", *calibration, *text],
        "optimize": [tiny, "--max-loss", "1%", "--out", str(folder / "small"), *calibration, *text],
        "catalogue": [],
        "train": ["digits", "--recipe", "static", "--steps", "2"],
        "methods": [],
        "cache": [],
        "report": [str(folder / "half")],
        "bench": ["--layout", "bitmask,n_m@2:4", "--shape", "8x64", "--memory", "100000", "--rounds", "5"],
        "bench experts": ["--op", "experts", "--experts", "4:2:8:4", "--memory", "1", "--rounds", "5"],
    }
    cached_folder("entry", lambda draft: draft.joinpath("file").write_bytes(b"12"), {})
    commands["bench decode"] = [
        "--op",
        "decode",
        "--model",
        f"{tiny}@transformers",
        "--model",
        f"{tiny}@{'native' if native() else 'transformers'}",
        "--tokens",
        "2",
        "--rounds",
        "5",
        "--text",
        f"{tiny}/text.txt",
        "--scored",
        "600",
    ]
    levers = ["--target", "speed", "--bits", "int8", "--recipes", "magnitude", "--allocations", "default", "--calibration", f"{tiny}/text.txt", "--calibration-tokens", "2048"]
    other = folder / "other.txt"
    other.write_text(" ".join(random.Random(0).choices(["few", "weights", "stay", "and", "learn"], k=2000)))
    healing = ["--target", "sparse-speed", "--bits", "none", "--gates", "none", "--heal", "spp", "--heal-tokens", "512", "--recipes", "magnitude"]
    commands["optimize and heal"] = [tiny, "--max-loss", "50%", "--out", str(folder / "mended"), *healing, "--calibration", str(other), *text]
    commands["optimize for speed"] = [tiny, "--max-loss", "5%", "--out", str(folder / "fast"), *levers, *text]
    found = {}
    for verb, arguments in commands.items():
        out = StringIO()
        with redirect_stdout(out):
            assert main([verb.split()[0], *arguments, "--json"]) == 0, verb
        found[verb] = json.loads(out.getvalue())
    yield found
    patch.undo()


def test_the_cache_that_was_listed_holds_an_entry(printed: dict[str, Any]) -> None:
    assert [entry["bytes"] > 0 for entry in printed["cache"]["entries"]] == [True]


def validator(verb: str) -> Any:
    schema = json.loads((SCHEMAS / f"{verb.split()[0]}.v1.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("verb", VERBS)
def test_what_a_verb_prints_is_valid(printed: dict[str, Any], verb: str) -> None:
    errors = [f"{error.json_path}: {error.message}" for error in validator(verb).iter_errors(printed[verb])]
    assert errors == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_schema_refuses_a_document_with_a_promised_key_missing(printed: dict[str, Any], verb: str) -> None:
    schema = validator(verb)
    rows = printed[verb] if isinstance(printed[verb], list) else [printed[verb]]
    for key in _required(schema.schema.get("items") or schema.schema, rows[0]):
        broken = copy.deepcopy(rows[:1])
        del broken[0][key]
        assert not schema.is_valid(broken if isinstance(printed[verb], list) else broken[0]), key


def _required(schema: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """Of the form that the row has, where there are several."""
    return next(form["required"] for form in schema.get("anyOf", [schema]) if jsonschema.Draft202012Validator(form).is_valid(row))


def test_a_schema_refuses_wrong_values(printed: dict[str, Any]) -> None:
    record = copy.deepcopy(printed["prune"])
    record["sites"][0]["density"] = 1.5
    assert not validator("prune").is_valid(record)
    record = copy.deepcopy(printed["train"])
    record["metric"]["accuracy"] = "high"
    assert not validator("train").is_valid(record)
    assert not validator("report").is_valid({"report": "half"})
    assert not validator("cache").is_valid({**printed["cache"], "freed_bytes": -1})
    assert not validator("methods").is_valid([])
    rows = copy.deepcopy(printed["catalogue"][:1])
    rows[0]["status"] = "done"
    assert not validator("catalogue").is_valid(rows)


def test_prune_json_in_the_folder_is_what_was_printed(printed: dict[str, Any]) -> None:
    saved = json.loads((Path(printed["prune"]["out"]) / "prune.json").read_text())
    assert {k: v for k, v in printed["prune"].items() if k != "out"} == {k: v for k, v in saved.items() if k != "out"}
