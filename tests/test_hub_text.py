"""Calibration and held-out text: disjoint by article, deterministic, refused where it is too short."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy.core.errors import BadInput, MissingExtra
from rarefy.hub import demo, text

embedded = pytest.mark.skipif(find_spec("gensim") is None, reason="the package that ships the text is not installed")


class Letters:
    """A tokenizer of one token a character, with a BOS."""

    bos_token_id = 1

    def __call__(self, words: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [2 + ord(c) % 50 for c in words]}


@pytest.mark.parametrize(
    ("wikitext", "plain"),
    [
        ("{{a|{{b}}}}Text", "Text"),
        ("[[ant|Ants]] and [[bee]]s", "Ants and bees"),
        ("see [http://x.org the site].", "see the site."),
        ("a<ref name=x/>b<ref>c</ref>d<!-- e -->f", "abdf"),
        ("[[File:x.jpg|thumb|a [[b]] c]]Text", "Text"),
        ("{| class=x\n| cell\n|}\nText", "Text"),
        ("== Head ==\nText\n\n\n\nMore", "Text\n\nMore"),
        ("AT&amp;T &lt;b&gt;bold&lt;/b&gt; ''it''", "AT&T bold it"),
    ],
)
def test_clean_up(wikitext: str, plain: str) -> None:
    assert text.plain(wikitext) == plain


@embedded
def test_articles_are_clean_and_the_two_lists_share_none() -> None:
    calibration, heldout = set(text.calibration_articles()), set(text.heldout_articles())
    assert not calibration & heldout
    assert len(calibration) + len(heldout) == len(text.articles()) > 60
    everything = "\n".join(text.articles())
    assert sum(len(a.split()) for a in text.articles()) > 300_000
    for markup in ("[[", "{{", "<ref", "&amp;"):
        assert everything.count(markup) < 60, markup  # what is left is unbalanced in the source


@embedded
def test_calibration_and_held_out_windows_share_no_text() -> None:
    seen = text.calibration_batches(Letters(), tokens=4096, window=128)
    held = text.heldout_ids(Letters(), 100_000).unfold(0, 127, 1)
    assert not any(bool((held == batch["input_ids"][0, 1:]).all(1).any()) for batch in seen[:8])


@embedded
def test_batches_are_of_the_asked_shape_and_a_function_of_the_seed() -> None:
    first, again, other = (text.calibration_batches(Letters(), tokens=1024, window=128, seed=s) for s in (0, 0, 1))
    assert [b["input_ids"].shape for b in first] == [(1, 128)] * 8
    assert all(int(b["input_ids"][0, 0]) == Letters.bos_token_id and bool(b["attention_mask"].all()) for b in first)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other, strict=True))
    assert len({tuple(b["input_ids"][0].tolist()) for b in first}) == 8


def test_a_file_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("abc " * 200, encoding="utf-8")
    assert text.heldout_ids(Letters(), 4, tmp_path / "mine.txt").tolist() == [2 + ord(c) % 50 for c in "abc "]
    assert len(text.calibration_batches(Letters(), 256, 64, path=tmp_path / "mine.txt")) == 4


def test_too_short_says_how_many_tokens_are_needed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("abc", encoding="utf-8")
    with pytest.raises(BadInput, match=r"has 5 tokens: 252 are needed"):
        text.calibration_batches(Letters(), 256, 64, path=tmp_path / "mine.txt")
    with pytest.raises(BadInput, match=r"has 5 tokens: 100 are needed"):
        text.heldout_ids(Letters(), 100, tmp_path / "mine.txt")


def test_unreadable_files_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, says in (("latin.txt", "UTF-8"), ("none.txt", "cannot be read"), ("", "cannot be read")):
        with pytest.raises(BadInput, match=says):
            text.read_text(tmp_path / name)


def test_without_the_package_its_name_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    absent: Any = lambda name: None  # noqa: E731
    monkeypatch.setattr(demo, "find_spec", absent)
    text.articles.cache_clear()
    with pytest.raises(MissingExtra, match=r"pip install --no-deps gensim==4\.4\.0"):
        text.articles()
