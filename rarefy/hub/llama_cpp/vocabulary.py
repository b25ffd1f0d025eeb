"""A tokenizer as GGUF's metadata: tokens, kinds, merges or scores, and which of llama.cpp's own splitters it uses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rarefy.core.errors import BadInput, Refused

LEAVE_OUT = "pass --no-tokenizer: llama.cpp then takes token ids"
NORMAL, UNKNOWN, CONTROL, DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES, _PLAIN = ("ByteLevel", True), ("ByteLevel", False)  # with GPT-2's own expression, without
# {(what splits the text, in order): llama.cpp's name of it}
SPLITTERS: dict[tuple[tuple[Any, ...], ...], str] = {
    (_BYTES,): "gpt-2",
    (("Digits", True), _BYTES): "smollm",
    (("Split", _WORDS + r"\p{N}{1,3}" + _REST, "Isolated", False), _PLAIN): "llama-bpe",
    (("Split", _WORDS + r"\p{N}" + _REST, "Isolated", False), _PLAIN): "qwen2",
}
WHOLE_WORDS = ("llama-bpe",)  # llama.cpp takes a word that is a token before it merges
NORMALISED = {"qwen2": "NFC"}  # llama.cpp leaves that to the caller; text is NFC nearly everywhere


def describe(writer: Any, tokenizer: Any, rows: int) -> str:
    """Write the tokenizer into a `gguf.GGUFWriter`'s header, padded to the rows of the embedding.

    Byte-level BPE (Llama 3, Qwen2, SmolLM2, GPT-2) and SentencePiece's BPE with byte fallback (Llama 2, Mistral). llama.cpp splits text by
    rules that it holds by name, so that only splitters that it has are written; SentencePiece's scores are made from the order of merges.

    Returns:
        llama.cpp's name of the kind: gpt2 or llama.

    Raises:
        BadInput: no fast tokenizer. Refused: one that llama.cpp would read otherwise; what is in its way is named.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise BadInput("no tokenizer that can be read" if tokenizer is None else f"a {type(tokenizer).__name__}", "a GGUF file holds its tokenizer", LEAVE_OUT)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        raise _refused(f"a tokenizer of type {state['model']['type']}", "llama.cpp is given BPE")
    tokens, kinds = _tokens(state, rows)
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in state["model"]["merges"]]
    if state["model"]["byte_fallback"]:
        kind = _sentencepiece(writer, state, tokens, kinds, merges)
    else:
        kind = _byte_level(writer, state, merges)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _ends(writer, tokenizer)
    return kind


def _tokens(state: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    found = {number: (token, NORMAL) for token, number in state["model"]["vocab"].items()}
    for added in state["added_tokens"]:
        found[added["id"]] = (added["content"], CONTROL if added["special"] else DEFINED)
    if max(found, default=0) >= rows:
        raise BadInput(f"a tokenizer with token {max(found)}", f"the embedding has {rows} rows", LEAVE_OUT)
    every = [found.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    return [token for token, _ in every], [kind for _, kind in every]


def _byte_level(writer: Any, state: Mapping[str, Any], merges: Sequence[tuple[str, ...]]) -> str:
    steps = state["pre_tokenizer"] or {"type": "none"}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    name = SPLITTERS.get(tuple(_splits(step) for step in steps))
    if name is None:
        raise _refused(
            "a tokenizer that splits text by " + ", ".join(step["type"] for step in steps),
            f"the splitters that rarefy knows llama.cpp's names of are {', '.join(SPLITTERS.values())}",
        )
    normaliser = (state["normalizer"] or {"type": None})["type"]
    if normaliser not in (None, NORMALISED.get(name)):
        raise _refused(f"a tokenizer that normalises text by {normaliser}", "llama.cpp would not")
    if bool(state["model"].get("ignore_merges")) != (name in WHOLE_WORDS):
        raise _refused(f"ignore_merges={bool(state['model'].get('ignore_merges'))} of the tokenizer", f"llama.cpp's {name} does the other")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_add_space_prefix(False)
    return "gpt2"


def _splits(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a splitter changes its result."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "ByteLevel", step["use_regex"]
    if step["type"] == "Digits":
        return "Digits", step["individual_digits"]
    if step["type"] == "Split":
        return "Split", step["pattern"].get("Regex"), step["behavior"], step["invert"]
    return (step["type"], json.dumps(step))


def _sentencepiece(writer: Any, state: Mapping[str, Any], tokens: Sequence[str], kinds: list[int], merges: Sequence[tuple[str, ...]]) -> str:
    prefix, order = _space_before(state), _order(merges)
    if state["model"].get("ignore_merges"):
        raise _refused("ignore_merges=True of the tokenizer", "llama.cpp merges every word")
    for number, token in enumerate(tokens):
        if token == state["model"]["unk_token"]:
            kinds[number] = UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[number] = BYTE
        elif kinds[number] == NORMAL and len(token) > 1 and token not in order:
            raise _refused(f"a tokenizer with the token {token!r}, which no merge makes", "llama.cpp would make it")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(order.get(token, len(order))) if kind == NORMAL else 0.0 for token, kind in zip(tokens, kinds, strict=True)])
    writer.add_add_space_prefix(prefix)
    return "llama"


def _order(merges: Sequence[tuple[str, ...]]) -> dict[str, int]:
    """{token: its place in the order of merges}, since llama.cpp merges what makes the token of the highest score.

    >>> _order([("a", "b"), ("ab", "c"), ("a", "bc")])
    {'ab': 0, 'abc': 1}
    """
    order: dict[str, int] = {}
    last = None
    for made in map("".join, merges):
        if made != last and made in order:
            raise _refused(f"a tokenizer whose merges into {made!r} have others between them", "llama.cpp orders merges by what they make")
        order.setdefault(made, len(order))
        last = made
    return order


def _space_before(state: Mapping[str, Any]) -> bool:
    """Whether the text begins with a space more, of a tokenizer that writes spaces as U+2581."""
    normaliser, splitter = state["normalizer"], state["pre_tokenizer"]
    steps = normaliser["normalizers"] if normaliser and normaliser["type"] == "Sequence" else [normaliser] if normaliser else []
    if splitter is None:
        replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        if steps[-1:] == [replaced] and steps[:-1] in ([], [{"type": "Prepend", "prepend": "▁"}]):
            return len(steps) == 2
    elif not steps and splitter["type"] == "Metaspace" and splitter["replacement"] == "▁" and not splitter["split"]:
        return bool(splitter["prepend_scheme"] != "never")
    kinds = [step["type"] for step in (*steps, *([splitter] if splitter else []))]
    raise _refused(f"a tokenizer with byte fallback that prepares text by {', '.join(kinds) or 'nothing'}", "llama.cpp only writes spaces as U+2581")


def _ends(writer: Any, tokenizer: Any) -> None:
    """Special tokens, which of them surround a text, and the template of a chat."""
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("unk", writer.add_unk_token_id), ("pad", writer.add_pad_token_id)):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            add(number)
    plain, full = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    begins, ends = full[:1] == [tokenizer.bos_token_id], full[-1:] == [tokenizer.eos_token_id]
    if full != [tokenizer.bos_token_id] * begins + plain + [tokenizer.eos_token_id] * ends:
        raise _refused(f"a tokenizer that makes {len(full)} tokens of {len(plain)}", "llama.cpp puts only BOS before and EOS behind a text")
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _refused(what: str, rule: str) -> Refused:
    return Refused(what, rule, LEAVE_OUT)
