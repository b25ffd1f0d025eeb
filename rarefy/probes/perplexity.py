"""Perplexity of a causal language model over a text, with its protocol in the record and an interval over windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import BadInput, Refused
from rarefy.weights.account import model_name

DEFAULT_TOKENS = 16_384
DEFAULT_WINDOW = 512


@dataclass(frozen=True)
class Span:
    """One window: the model reads ids[begin:end], of which ids[score:end] are scored."""

    begin: int
    score: int
    end: int


def spans(count: int, window: int, stride: int | None = None, bos: bool = False) -> tuple[Span, ...]:
    """Cut `count` tokens into windows that score every token once, the earlier ones of a window being context only.

    A window holds `window` positions, a leading BOS included. Without BOS the first token of a text, and with
    ``stride == window`` the first of every window, has no context and is not scored. `stride` None: disjoint windows.

    Raises BadInput where the window is below two positions or the stride outside [1, positions].

    >>> spans(5, 3, bos=True)
    (Span(begin=0, score=0, end=2), Span(begin=2, score=2, end=4), Span(begin=4, score=4, end=5))
    >>> spans(5, 3, stride=1)
    (Span(begin=0, score=1, end=3), Span(begin=1, score=3, end=4), Span(begin=2, score=4, end=5))
    """
    if window < 2:
        raise BadInput(f"window is {window}", "a window holds at least two positions", "pass for example 512")
    room = window - bos
    step = room if stride is None else stride
    if not 1 <= step <= room:
        raise BadInput(f"stride is {step}", f"a stride lies in [1, {room}] for this window", "a larger stride would skip tokens")
    return tuple(_spans(count, room, step, bos))


def _spans(count: int, room: int, step: int, bos: bool) -> Iterator[Span]:
    done, begin = 0, 0
    while done < count:
        end = min(begin + room, count)
        score = max(done, begin if bos else begin + 1)
        if score < end:
            yield Span(begin, score, end)
        done, begin = end, begin + step


def need_causal(model: nn.Module) -> None:
    """Refused: every attention of the model looks ahead, so that it would be asked for a token that it sees."""
    seen = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    if seen and not any(seen):
        raise Refused(f"{model_name(model)} is a {type(model).__name__} that attends in both directions", "next-token figures of it mean nothing", "use a causal language model")


def _checked(model: nn.Module, ids: Tensor, window: int) -> Tensor:
    if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise BadInput(f"ids are {ids.dtype} of shape {list(ids.shape)}", "a text is one row of token ids, int64 [N]", "pass ids.flatten()")
    need_causal(model)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit is not None and window > limit:
        raise BadInput(f"window is {window}", f"this model has {limit} positions", f"pass a window of at most {limit}")
    return ids.long()


def _span_nll(model: nn.Module, ids: Tensor, span: Span, bos: int | None, device: torch.device) -> Tensor:
    piece = ids[span.begin : span.end].to(device)
    if bos is not None:
        piece = torch.cat([piece.new_tensor([bos]), piece])
    logits = model(input_ids=piece[None], use_cache=False).logits[0]
    wanted = span.end - span.score
    nll = nn.functional.cross_entropy(logits[-wanted - 1 : -1].float(), piece[-wanted:], reduction="none")
    if not bool(torch.isfinite(nll).all()):
        raise BadInput(f"the model's logits at tokens {span.begin}..{span.end}", "are not finite (NaN or infinity)", "check the weights, or evaluate in float32")
    return nll.cpu()


def token_nll(model: nn.Module, ids: Tensor, window: int = DEFAULT_WINDOW, stride: int | None = None, bos: int | None = None) -> Tensor:
    """Negative log-likelihood of every scored token, in order.

    ``nll_t = -log p(id_t | ids of its window before t)``; ids int64 [N], `bos` a token id put before each window or
    None; float32 [N] nats with a BOS; without one, less the tokens that `spans` cannot score.

    Raises BadInput for malformed ids, a window beyond the model's positions, logits that are not finite; Refused for a
    model that is not causal.
    """
    return torch.cat(_window_nll(model, ids, window, stride, bos) or [torch.empty(0)])


@torch.no_grad()
def _window_nll(model: nn.Module, ids: Tensor, window: int, stride: int | None, bos: int | None) -> list[Tensor]:
    ids = _checked(model, ids, window)
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        return [_span_nll(model, ids, span, bos, device) for span in spans(ids.numel(), window, stride, bos is not None)]
    finally:
        model.train(training)


def bootstrap(sums: Tensor, counts: Tensor, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[float, float] | None:
    """Percentile interval of ``sum(sums) / sum(counts)`` with whole windows resampled; None below two windows.

    sums, counts float [W]. Windows, not tokens, are drawn, because tokens of one window depend on each other
    (Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 8.5: resampling blocks).

    >>> bootstrap(torch.tensor([2., 2.]), torch.tensor([1., 1.]))
    (2.0, 2.0)
    """
    if sums.numel() < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(sums.numel(), (resamples, sums.numel()), generator=generator)
    means = sums.double()[draw].sum(1) / counts.double()[draw].sum(1)
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    tokens: int = DEFAULT_TOKENS,
    window: int = DEFAULT_WINDOW,
    stride: int | None = None,
    bos: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Perplexity over the first `tokens` of a text, the protocol beside the figure.

    ``exp(mean_t nll_t)`` over scored tokens; ids int64 [N]; the record holds the 95% bootstrap `interval` over windows
    (None for one window), `nll` in nats a token, how many tokens were scored, and window, stride, bos, dtype, without
    which two perplexities cannot be compared.

    Raises BadInput where the text is shorter than `tokens`, and as `token_nll` does.
    """
    if ids.numel() < tokens or tokens < 2:
        raise BadInput(f"the text has {ids.numel()} tokens", f"{tokens} were asked for, and at least 2 are needed", "give a longer text, or ask for fewer tokens")
    per_window = _window_nll(model, ids[:tokens], window, stride, bos)
    sums, counts = torch.tensor([float(w.double().sum()) for w in per_window]), torch.tensor([float(w.numel()) for w in per_window])
    mean = float(torch.cat(per_window).double().mean())
    limits = bootstrap(sums, counts, resamples, seed)
    return {
        "model": model_name(model),
        "perplexity": float(torch.tensor(mean, dtype=torch.float64).exp()),
        "interval": None if limits is None else [float(torch.tensor(x, dtype=torch.float64).exp()) for x in limits],
        "nll": mean,
        "tokens": int(counts.sum()),
        "windows": len(per_window),
        "window": window,
        "stride": stride if stride is not None else window - (bos is not None),
        "bos": bos,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
