"""Greedy generation through transformers, timed: prefill and decode apart, with the bytes that were resident at the peak."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.hub.engines import use_engine
from rarefy.probes.memory import peak_bytes
from rarefy.probes.perplexity import need_causal
from rarefy.probes.timers import busy
from rarefy.weights.account import model_name


def generate(model: Any, tokenizer: Any, prompt: str, *, tokens: int = 64, runs: int = 3, engine: str = "transformers", head: str | None = None) -> dict[str, Any]:
    """Generate greedily and time it.

    Args:
        model, tokenizer: a causal LM of transformers.
        prompt: not empty. tokens: new tokens, fewer where the model ends its text. engine, head: see `use_engine`. runs: timed rounds, the median counts.

    Returns:
        {model, engine, text, tokens, prefill_tokens_per_s, decode_tokens_per_s, decode_spread: [slowest, fastest],
        model_bytes, rss_bytes (the peak), warning}; all speeds are measured.

    Raises:
        BadInput: an empty prompt, no room for a token, or no round. Refused: a model that is not causal.
    """
    if runs < 1:
        raise BadInput(f"runs is {runs}", "at least one timed round is needed", "pass for example 3")
    need_causal(model)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    room = getattr(model.config, "max_position_embeddings", None) or ids.shape[1] + tokens
    if not ids.numel() or tokens < 1 or ids.shape[1] + tokens > room:
        raise BadInput(f"a prompt of {ids.numel()} tokens and {tokens} new ones", f"the prompt is not empty and all fit the model's {room} positions")
    running = use_engine(model, engine, head)
    warning = busy()
    timed = [_run(model, ids, tokens) for _ in range(runs)]
    prefill = statistics.median(t[0] for t in timed)
    decode = [t[1] / max(t[2].shape[1] - ids.shape[1] - 1, 1) for t in timed]
    new = timed[0][2][0, ids.shape[1] :]
    return {
        "model": model_name(model),
        "engine": running,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "prefill_tokens_per_s": ids.shape[1] / prefill,
        "decode_tokens_per_s": 1 / statistics.median(decode) if len(new) > 1 else None,
        "decode_spread": [1 / max(decode), 1 / min(decode)] if len(new) > 1 else None,
        "model_bytes": sum(t.numel() * t.element_size() for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()),
        "rss_bytes": peak_bytes(),
        "warning": warning,
    }


def _run(model: Any, ids: Tensor, tokens: int) -> tuple[float, float, Tensor]:
    """(prefill seconds, decode seconds, all ids [1, T])."""
    end = model.generation_config.eos_token_id
    stops = set(end if isinstance(end, list) else [end])
    with torch.no_grad():
        began = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        following = out.logits[:, -1].argmax(-1, keepdim=True)
        prefilled = time.perf_counter()
        found = [ids, following]
        for _ in range(tokens - 1):
            if int(following) in stops:
                break
            out = model(following, past_key_values=out.past_key_values, use_cache=True)
            following = out.logits[:, -1].argmax(-1, keepdim=True)
            found.append(following)
    return prefilled - began, time.perf_counter() - prefilled, torch.cat(found, 1)
