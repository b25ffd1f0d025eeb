"""Text for calibration and evaluation: the embedded Wikipedia articles, or a file of the user's.

The articles are split by article: calibration and held-out text never share one.
"""

from __future__ import annotations

import bz2
import html
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.hub.demo import TEXT

WINDOW = 512
HELD_OUT_EVERY = 3  # every third article is held out
MINIMUM_ARTICLE = 2000  # characters: redirects and stubs are left out

_ARTICLE = re.compile(r"<text[^>]*>(.*?)</text>", re.DOTALL)
_MARKUP = (
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"<ref[^>]*?/>|<ref.*?</ref>", re.DOTALL), ""),
    (re.compile(r"<(math|gallery|timeline|code|pre|table)\b.*?</\1>", re.DOTALL), ""),
    (re.compile(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]"), ""),
    (re.compile(r"\[\[(?:[^|\[\]]*\|)?([^\[\]]*)\]\]"), r"\1"),
    (re.compile(r"\[https?://\S+ ?([^\]]*)\]"), r"\1"),
    (re.compile(r"<[^>]+>"), ""),
    (re.compile(r"'{2,}"), ""),
    (re.compile(r"^[ \t]*(?:[|!{}*#:;=].*)$", re.MULTILINE), ""),
    (re.compile(r"[ \t]+"), " "),
    (re.compile(r"\n\s*\n+"), "\n\n"),
)
_INNER_BRACES = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}")


def plain(wikitext: str) -> str:
    """Wikitext without templates, tables, references and markup; paragraphs stay.

    >>> plain("'''Ants''' are {{a|b{{c}}}}[[insect|insects]].<ref>x</ref>")
    'Ants are insects.'
    """
    text = html.unescape(html.unescape(wikitext))
    while _INNER_BRACES.search(text):
        text = _INNER_BRACES.sub("", text)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


@cache
def articles() -> tuple[str, ...]:
    """The embedded articles as plain text, in the order of the file.

    Read by a pattern, not by an XML parser: entities cannot expand.
    """
    raw = bz2.decompress(TEXT.path().read_bytes()).decode("utf-8")
    texts = (plain(found.group(1)) for found in _ARTICLE.finditer(raw))
    return tuple(t for t in texts if len(t) >= MINIMUM_ARTICLE)


def calibration_articles() -> tuple[str, ...]:
    return tuple(a for i, a in enumerate(articles()) if i % HELD_OUT_EVERY)


def heldout_articles() -> tuple[str, ...]:
    return articles()[::HELD_OUT_EVERY]


def token_ids(tokenizer: Any, texts: Iterator[str] | tuple[str, ...], tokens: int, what: str) -> Tensor:
    """The first `tokens` token ids of the texts, int64 [tokens]; a newline pair between texts.

    Raises:
        BadInput: the texts are too short; the message says how many tokens there are.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            return torch.tensor(ids[:tokens])
    raise BadInput(f"{what} has {len(ids)} tokens", f"{tokens} are needed", "give a longer text, or ask for fewer tokens")


def read_text(path: str | Path) -> tuple[str, ...]:
    """A plain text file of the user's as one text.

    Raises:
        BadInput: no such file, or not UTF-8.
    """
    try:
        return (Path(path).read_text(encoding="utf-8"),)
    except UnicodeDecodeError as error:
        raise BadInput(f"text {path}", "it must be UTF-8", f"byte {error.start} is not") from error
    except OSError as error:
        raise BadInput(f"text {path}", f"it cannot be read ({error.strerror})", "name a plain text file") from error


def calibration_batches(tokenizer: Any, tokens: int = 8192, window: int = WINDOW, seed: int = 0, path: str | Path | None = None) -> list[dict[str, Tensor]]:
    """`tokens` calibration tokens as batches of one window each, {"input_ids": [1, window], "attention_mask"}.

    Each window begins with the tokenizer's BOS where it has one. Windows are drawn without replacement, by `seed`,
    from the first four times as many tokens as are needed (fewer where the text is shorter).
    """
    texts = calibration_articles() if path is None else read_text(path)
    what = "the calibration text" if path is None else f"calibration text {path}"
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = window - len(start)
    count = max(1, round(tokens / window))
    pool = token_ids_up_to(tokenizer, texts, 4 * count * body)
    if pool.numel() < count * body:
        raise BadInput(
            f"{what} has {pool.numel()} tokens", f"{count * body} are needed for {count} windows of {window}", "give a longer text, or ask for fewer --calibration-tokens"
        )
    chunks = pool[: pool.numel() // body * body].view(-1, body)
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(seed))[:count]
    head = torch.tensor([start], dtype=torch.long)
    windows = [torch.cat([head, chunks[i][None]], 1) for i in sorted(order.tolist())]
    return [{"input_ids": w, "attention_mask": torch.ones_like(w)} for w in windows]


def token_ids_up_to(tokenizer: Any, texts: tuple[str, ...], tokens: int) -> Tensor:
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            break
    return torch.tensor(ids[:tokens], dtype=torch.long)


def heldout_ids(tokenizer: Any, tokens: int, path: str | Path | None = None) -> Tensor:
    """The first `tokens` held-out token ids, int64 [tokens]."""
    return token_ids(tokenizer, heldout_articles() if path is None else read_text(path), tokens, "the held-out text" if path is None else f"text {path}")
