"""`rarefy eval --tasks`: the harness scores the model we loaded, packed or not; without it, one sentence names the extra.

The first tests run everywhere, against a stand-in with the harness's interface; the last need the package itself.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from rarefy.cli.main import main
from rarefy.probes import harness as probe
from tests.test_cli_schema import model_folder, validator

DOCUMENTS = [
    {"context": "sparse networks", "choices": [" keep", " zzzz"], "label": 0},
    {"context": "abc", "choices": ["def", "qqq"], "label": 1},
    {"context": "keep what", "choices": [" to", " xx"], "label": 0},
    {"context": "choose", "choices": ["k", "q"], "label": 1},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("harness") / "tiny")


def test_without_the_package_the_extra_is_named_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(probe, "find_spec", lambda name: None)
    assert main(["eval", "/no/such/model", "--tasks", "hellaswag"]) == 4
    assert capsys.readouterr().err == "error: lm_eval is not installed: this verb needs the extra 'eval'; run pip install 'rarefy[eval]'.\n"


def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules with the names that we use of lm_eval; returns what they were given."""
    given: dict[str, Any] = {}

    def simple_evaluate(lm: Any, **how: Any) -> dict[str, Any]:
        given.update(how, lm=lm)
        results = {"letters": {"alias": "letters", "acc,none": 0.25, "acc_stderr,none": 0.125, "f1,strict": 1, "f1_stderr,strict": "N/A"}}
        return {"results": results, "versions": {"letters": 2}, "n-shot": {"letters": 0}, "n-samples": {"letters": {"original": 9, "effective": 4}}}

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **how: SimpleNamespace(**how)},
        "lm_eval.tasks": {"TaskManager": lambda include_path: SimpleNamespace(all_tasks=["letters"], include_path=include_path)},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(probe, "version", lambda name: "0.0")
    return given


def test_the_loaded_model_is_what_is_scored(tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = stand_in(monkeypatch)
    assert main(["eval", tiny, "--tasks", "letters", "--shots", "3", "--limit", "4", "--batch", "2", "--seed", "7", "--task-folder", tiny, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [e.message for e in validator("eval-tasks").iter_errors(record)] == []
    head = {"task": "letters", "version": "2", "shots": 0, "samples": 4}
    assert record["tasks"] == [
        {**head, "metric": "acc", "filter": "none", "value": 0.25, "stderr": 0.125},
        {**head, "metric": "f1", "filter": "strict", "value": 1.0, "stderr": None},
    ]
    assert type(given["lm"].pretrained).__name__ == "LlamaForCausalLM"
    assert (given["lm"].batch_size, given["num_fewshot"], given["limit"], given["fewshot_random_seed"]) == (2, 3, 4, 7)
    assert given["task_manager"].include_path == tiny


@pytest.mark.parametrize(("tasks", "message"), [("none-such,letters", "task none-such: the harness has no task of that name"), (",", "a list names at least one thing")])
def test_what_cannot_be_scored_is_refused(tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tasks: str, message: str) -> None:
    stand_in(monkeypatch)
    assert main(["eval", tiny, "--tasks", tasks]) == 2
    assert message in capsys.readouterr().err


def own_task(folder: Path) -> Path:
    folder.mkdir()
    (folder / "letters.jsonl").write_text("\n".join(json.dumps(d) for d in DOCUMENTS))
    (folder / "letters.yaml").write_text(
        f"task: letters\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'letters.jsonl'}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{context}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\ntarget_delimiter: ""\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return folder


@torch.no_grad()
def by_hand(folder: str) -> float:
    """The share of documents whose labelled choice has the largest sum of log probabilities after its context."""
    from rarefy.hub.load import load

    loaded = load(folder)
    hits = 0
    for document in DOCUMENTS:
        sums = []
        for choice in document["choices"]:
            ids = [loaded.tokenizer(part, add_special_tokens=False).input_ids for part in (document["context"], document["context"] + choice)]
            logits = loaded.model(torch.tensor([ids[1]])).logits[0].log_softmax(-1)
            sums.append(float(sum(logits[i - 1, ids[1][i]] for i in range(len(ids[0]), len(ids[1])))))
        hits += max(range(2), key=sums.__getitem__) == document["label"]
    return hits / len(DOCUMENTS)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra 'eval'")
def test_the_harness_itself_agrees_with_sums_by_hand_on_dense_and_packed_models(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks, half, packed = own_task(tmp_path / "tasks"), str(tmp_path / "half"), str(tmp_path / "packed")
    assert main(["prune", tiny, "--recipe", "magnitude", "--out", half, "--calibration", f"{tiny}/text.txt", "--calibration-tokens", "512"]) == 0
    assert main(["pack", half, "--out", packed]) == 0
    capsys.readouterr()
    for folder in (tiny, half, packed):
        assert main(["eval", folder, "--tasks", "letters", "--task-folder", str(tasks), "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert [e.message for e in validator("eval-tasks").iter_errors(record)] == []
        assert record["harness"] == importlib.metadata.version("lm_eval")
        (row,) = record["tasks"]
        assert (row["task"], row["metric"], row["samples"]) == ("letters", "acc", len(DOCUMENTS))
        assert row["value"] == by_hand(folder)
