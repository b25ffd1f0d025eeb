"""The model card of a folder that we write: what was done to which model, what it cost by which protocol, how it loads, on whose licence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

README = "README.md"
TAG = "rarefy"
_DONE = "What was done"
_LICENCE = ("license", "license_name", "license_link")
_NAME = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@[\w./-]+)?")


@dataclass(frozen=True)
class Figure:
    """One row of the card: what it is, its value, how it was measured."""

    what: str
    value: str
    how: str


@dataclass(frozen=True)
class Card:
    """What one verb did.

    done: a word for the title, "pruned". steps: a sentence each; those of the base's own card come before them.
    record: the file with every detail. packed: transformers needs rarefy to load the folder.
    """

    done: str
    steps: tuple[str, ...]
    figures: tuple[Figure, ...] = ()
    record: str | None = None
    packed: bool = False


@dataclass(frozen=True)
class Origin:
    """The model that was worked on: its name, its id on the Hub where it is known, what its card says of its licence, and what was done to it before."""

    name: str
    hub: str | None = None
    licence: tuple[tuple[str, str], ...] = ()
    steps: tuple[str, ...] = ()


def write_card(folder: Path, model: Any, card: Card) -> None:
    """Write README.md beside the weights in `folder`, with front matter as the Hugging Face Hub reads it."""
    spec = str(getattr(model.config, "_name_or_path", "") or "")
    (folder / README).write_text(render(card, origin(spec, model), type(model).__name__, weights(folder)))


def weights(folder: Path) -> dict[str, int]:
    """{file: bytes} of the weights in a folder."""
    return {file.name: file.stat().st_size for file in sorted(folder.glob("model*.safetensors"))}


def origin(spec: str, model: Any) -> Origin:
    """Where a model came from, by the name or folder that it was loaded from; a licence in its config counts where no card names one."""
    folder = Path(spec).expanduser() if spec else None
    here = folder is not None and folder.exists()
    text = _read(folder / README) if here and folder is not None else _cached(spec)
    fields = front_matter(text)
    licence = tuple((key, fields[key]) for key in _LICENCE if isinstance(fields.get(key), str))
    if not licence and isinstance(said := getattr(model.config, "license", None), str):
        licence = ((_LICENCE[0], said),)
    named = _NAME.fullmatch(spec)
    ours = TAG in (fields.get("tags") or ())
    base = fields.get("base_model") if ours else named["id"] if named and not here else None
    steps = tuple(_steps(text)) if ours else ()
    name = folder.resolve().name if here and folder is not None else spec or type(model).__name__
    return Origin(name, base if isinstance(base, str) else None, licence, steps)


def front_matter(text: str) -> dict[str, Any]:
    """The fields between the first two lines of dashes; none where they are no YAML mapping.

    >>> front_matter("---\\nlicense: mit\\n---\\n# A model\\n"), front_matter("# A model\\n")
    ({'license': 'mit'}, {})
    """
    import yaml

    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        fields = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:  # a card that the Hub could not read either
        return {}
    return fields if isinstance(fields, dict) else {}


def render(card: Card, base: Origin, kind: str, files: Mapping[str, int]) -> str:
    """The text of the card; `kind` is the class that loads the model, `files` its weights with their bytes.

    >>> print(render(Card("pruned", ("Half of the weights were set to zero.",)), Origin("acme/tiny", "acme/tiny", (("license", "mit"),)), "LlamaForCausalLM", {"model.safetensors": 2_000_000}))
    ---
    license: mit
    base_model: acme/tiny
    library_name: transformers
    pipeline_tag: text-generation
    tags:
    - rarefy
    - pruned
    ---
    <BLANKLINE>
    # acme/tiny, pruned
    <BLANKLINE>
    ## What was done
    <BLANKLINE>
    1. Half of the weights were set to zero.
    <BLANKLINE>
    ## Size
    <BLANKLINE>
    `model.safetensors`: 2,000,000 bytes.
    <BLANKLINE>
    ## How to load it
    <BLANKLINE>
    The weights are dense with zeros and load in plain transformers:
    <BLANKLINE>
    ```python
    from transformers import LlamaForCausalLM
    <BLANKLINE>
    model = LlamaForCausalLM.from_pretrained(FOLDER)
    ```
    <BLANKLINE>
    ## Licence
    <BLANKLINE>
    That of the base model, acme/tiny: `mit`.
    <BLANKLINE>
    """
    parts = [f"# {base.name}, {card.done}", f"## {_DONE}", "\n".join(f"{i}. {' '.join(step.split())}" for i, step in enumerate((*base.steps, *card.steps), 1))]
    if card.record:
        parts.append(f"`{card.record}` holds the record of the last step.")
    if card.figures:
        rows = [f"| {figure.what} | {figure.value} | {figure.how} |" for figure in card.figures]
        parts += ["## Figures", "\n".join(["| what | value | how |", "|---|---|---|", *rows])]
    parts += ["## Size", _size(files)] if files else []
    parts += ["## How to load it", *_loading(kind, card.packed), "## Licence", _licence(base)]
    return _front(card, base, kind) + "\n\n".join(parts) + "\n"


def _front(card: Card, base: Origin, kind: str) -> str:
    import yaml

    fields: dict[str, Any] = dict(base.licence)
    if base.hub is not None:
        fields["base_model"] = base.hub
    fields["library_name"] = TAG if card.packed else "transformers"
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        fields["pipeline_tag"] = "text-generation"
    fields["tags"] = [TAG, card.done]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n\n"


def _size(files: Mapping[str, int]) -> str:
    what = f"`{next(iter(files))}`" if len(files) == 1 else f"{len(files)} files of weights"
    return f"{what}: {sum(files.values()):,} bytes."


def _loading(kind: str, packed: bool) -> Iterator[str]:
    if packed:
        yield "transformers needs rarefy to load the packed weights, and raises an error without it:"
        yield f"```sh\npip install 'rarefy[hub]'\n```\n\n```python\nimport rarefy\nfrom transformers import {kind}\n\nmodel = {kind}.from_pretrained(FOLDER)\n```"
        yield "`rarefy unpack FOLDER --out PLAIN` makes plain weights of them."
    else:
        yield "The weights are dense with zeros and load in plain transformers:"
        yield f"```python\nfrom transformers import {kind}\n\nmodel = {kind}.from_pretrained(FOLDER)\n```"


def _licence(base: Origin) -> str:
    said = dict(base.licence)
    if not said:
        return "That of the base model, whose files name none."
    more = ", ".join(said[key] for key in _LICENCE[1:] if key in said)
    return f"That of the base model{f', {base.hub}' if base.hub else ''}: `{said.get(_LICENCE[0], '')}`" + (f" ({more})." if more else ".")


def _steps(text: str) -> Iterator[str]:
    """The numbered sentences of a card that we wrote."""
    section = re.search(rf"^## {_DONE}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    for found in re.finditer(r"^\d+\. (.+)$", section[1] if section else "", re.MULTILINE):
        yield found[1]


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _cached(spec: str) -> str:
    """The card of a model on the Hub, fetched if need be; empty where it cannot be had."""
    named = _NAME.fullmatch(spec)
    if named is None:
        return ""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    revision = spec.partition("@")[2] or None
    try:
        return _read(Path(hf_hub_download(named["id"], README, revision=revision)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        return ""
