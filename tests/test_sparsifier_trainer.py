"""transformers' Trainer: the callback prunes exactly, and a resumed run ends in the same weights."""

from __future__ import annotations

import pytest
import torch

from rarefy.core.records import Phase
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.rewiring.rigl import RigL
from rarefy.weights.schedules.constant import Constant
from rarefy.weights.sparsifier import Sparsifier

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def run(folder, steps, resume=False):
    from rarefy.hub.trainer import SparsifierCallback

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    rows = [{"input_ids": (ids := torch.randint(32, (8,))), "labels": ids} for _ in range(16)]
    sites = [n for n, _ in model.named_parameters() if "mlp" in n]
    sp = Sparsifier(model, Phase(density=Constant(0.25), criterion=Magnitude(), rewiring=RigL(), fraction=Constant(0.3), every=2), sites=sites, total=8)
    args = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        lr_scheduler_type="constant",
        seed=0,
    )
    trainer = transformers.Trainer(model, args, train_dataset=rows, callbacks=[SparsifierCallback(sp)])
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return model, sp


def test_trainer_prunes_exactly_and_resumes(tmp_path):
    model, sp = run(tmp_path / "a", 7)
    assert sp.progress.step == 7
    assert sp.progress.counts["rewire"] == 3
    assert sum(sp.support.counts().values()) == round(0.25 * 3 * 16 * 32)
    assert all((model.get_parameter(k)[~m] == 0).all() for k, m in sp.support.masks.items())
    run(tmp_path / "b", 3)
    again, sp2 = run(tmp_path / "b", 7, resume=True)
    assert sp2.progress == sp.progress
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
