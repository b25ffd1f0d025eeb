"""A small character Llama on Python's own help texts, pruned to 2:4, for papers that train a sparse language model back."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.discover import recipes
from rarefy.surgery.distil import next_token_loss
from rarefy.weights.patterns import parse_pattern
from rarefy.weights.prune import prune

LENGTH, HELD_OUT = 64, 16


def small(hidden: int = 48, layers: int = 2) -> Any:
    import transformers

    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, max_position_embeddings=LENGTH, **sizes)).eval()


@cache
def _text() -> Tensor:
    from pydoc_data.topics import topics

    text = "\n".join(topics[key] for key in sorted(topics))
    return torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()


def windows(seed: int, count: int, held_out: bool = False) -> list[Tensor]:
    """Character windows, int64 [1, 64] each, of the first nine tenths of the text, or of the rest."""
    ids = _text()
    cut = 9 * len(ids) // 10
    part = ids[cut:] if held_out else ids[:cut]
    starts = torch.randint(len(part) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return [part[s : s + LENGTH][None] for s in starts.tolist()]


@torch.no_grad()
def loss(model: nn.Module) -> float:
    """Nats a character on held-out text."""
    return float(torch.stack([next_token_loss(model, ids) for ids in windows(7, HELD_OUT, held_out=True)]).mean())


def train(model: Any, batches: list[Tensor], lr: float) -> Any:
    """The dense model trained on batches of windows, int64 [B, 64] each, the rate falling to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step, ids in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / len(batches))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return model


@cache
def _trained() -> Any:
    torch.manual_seed(0)
    return train(small(), [torch.cat(windows(1000 + step, 8)) for step in range(240)], 4e-3)


def dense_and_sparse() -> tuple[Any, Any]:
    """The trained model and its copy, pruned to 2:4 by Wanda."""
    from dataclasses import replace

    dense = copy.deepcopy(_trained())
    sparse = copy.deepcopy(dense)
    batches = [{"input_ids": ids} for ids in windows(3, 16)]
    prune(sparse, batches, replace(recipes()["wanda"], pattern=parse_pattern("2:4")), density=0.5)
    return dense, sparse


def two_of_four(weight: Tensor) -> bool:
    """At most two of every four neighbours along the inputs are not zero."""
    return bool((torch.count_nonzero(weight.unflatten(1, (-1, 4)), -1) <= 2).all())
