"""A folder that we wrote, onto the Hugging Face Hub as it lies: weights, config, tokenizer, records and card, and nothing that runs code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rarefy.core.errors import BadFile, MissingExtra, Refused
from rarefy.hub.card import README

KINDS = (".safetensors", ".json", ".jsonl", ".md", ".txt", ".model", ".jinja", ".html")  # weights and records, tokenizers, templates, reports


def push(folder: str | Path, repository: str, *, private: bool | None = None, api: Any = None) -> dict[str, Any]:
    """Upload a model folder in one commit; the repository is made where there is none.

    Args:
        folder: as `save_pretrained`, `rarefy.hub.export.save_dense` or `rarefy.hub.packed.save_packed` wrote it.
        repository: owner/name, or a name under your own account.
        private: of a new repository; None: as the account has it.
        api: a `huggingface_hub.HfApi`; default: one with the token of `hf auth login`.

    Returns:
        {repository, files: [name, bytes], url of the commit}.

    Raises:
        BadFile: no model folder. Refused: it holds a file of another kind than `KINDS`, a pickle say; or the Hub said no.
        MissingExtra: huggingface_hub.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ModuleNotFoundError as error:
        raise MissingExtra("huggingface_hub", "hub") from error
    files = uploads(Path(folder))
    hub = api if api is not None else HfApi(library_name="rarefy")
    try:
        name = hub.create_repo(repository, private=private, exist_ok=True).repo_id
        done = hub.upload_folder(repo_id=name, folder_path=str(folder), allow_patterns=list(files), commit_message="Upload a model made with rarefy")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = str(error).strip().splitlines()
        raise Refused(f"{repository} was not written", why[0].rstrip(".") if why else type(error).__name__, "check the name, your connection, and hf auth login") from error
    return {"repository": name, "files": [{"name": file, "bytes": size} for file, size in files.items()], "url": str(getattr(done, "commit_url", done))}


def uploads(folder: Path) -> dict[str, int]:
    """{file: bytes} of what is uploaded: every file at the top of the folder whose name does not begin with a dot. Raises as `push`."""
    if not (folder / "config.json").is_file():
        raise BadFile(str(folder), "is not a model folder: it holds no config.json", "name a folder that rarefy or save_pretrained wrote")
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    for file in files:
        if file.suffix not in KINDS:
            raise Refused(f"{file.name} in {folder}", f"only {', '.join(KINDS)} files are uploaded, and nothing that may run code", "move it out of the folder")
    if not (folder / README).is_file():
        raise Refused(f"{folder} without a {README}", "a model on the Hub says what it is", "write the folder with rarefy, or add a card")
    return {file.name: file.stat().st_size for file in files}
