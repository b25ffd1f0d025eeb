"""Our layers inside somebody else's model: a Llama with routed MLPs, and the page that says how."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.core.ambient import Ambient
from rarefy.core.trace import Trace
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.banks.glu import GLU
from rarefy.experts.moe import MoE
from rarefy.experts.overflow.capacity import Capacity
from rarefy.experts.routers.topk import TopK
from tests.test_doors import ByToken

transformers = pytest.importorskip("transformers")
PAGE = (Path(__file__).parent.parent / "docs" / "experts.md").read_text()
IDS = torch.tensor([[0, 0, 3, 9, 4], [5, 1, 7, 2, 8]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def hosted() -> tuple[Any, Ambient]:
    """Routers that need each token's id and place: a wrong column of the mask or a stale context changes the text."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model = transformers.LlamaForCausalLM(config)
    for block in model.model.layers:
        block.mlp = MoE(ByToken(), TopK(1, renormalise=False), GLU(4, 8, 6), Capacity(8.0, 8.0))  # no bound is met, but padding goes to nobody
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return model, Ambient.attach(model)


def test_generation_of_a_padded_batch_equals_each_prompt_alone_and_no_cache() -> None:
    model, _ = hosted()
    model.eval()

    def logits(ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True, return_dict_in_generate=True, **options)
        return torch.stack(out.logits, 1), out.sequences

    seen, text = logits(IDS, attention_mask=MASK)
    for row, start in ((0, 2), (1, 0)):
        prompt = IDS[row : row + 1, start:]
        for use_cache in (True, False):
            alone, same = logits(prompt, attention_mask=torch.ones_like(prompt), use_cache=use_cache)
            assert torch.equal(same[0], text[row, start:])
            torch.testing.assert_close(alone[0], seen[row], atol=1e-5, rtol=1e-5)


def test_two_checkpointed_forwards_equal_plain_ones() -> None:
    found = []
    for checkpointed in (False, True):
        model, ambient = hosted()
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": ambient.replay})
        with Trace(model) as trace:
            losses = [model(input_ids=ids, attention_mask=mask, labels=ids).loss for ids, mask in ((IDS, MASK), (IDS.flip(1), MASK.flip(0)))]
            (torch.stack(losses).sum() + torch.stack([LoadBalance(1.0)(e) for e in trace.entries]).sum()).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-5)


def test_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 5
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(block, scope)
    assert [sum(entry.routing.counts().tolist()) <= 20 for entry in scope["trace"].entries] == [True, True]
