"""Finished rows of a long job in one JSON file, written whole, so that a second run repeats nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rarefy.core.errors import BadInput
from rarefy.core.files import write_atomic


class Journal:
    """Rows by key; a key names everything that a row depends on.

    Raises:
        BadInput: the file is not JSON that a journal wrote.
    """

    def __init__(self, path: str | Path, setting: str) -> None:
        self.path, self.setting = Path(path), setting
        self.rows: dict[str, Any] = {}
        if self.path.is_file():
            try:
                self.rows = dict(json.loads(self.path.read_text()))
            except (ValueError, TypeError) as error:
                raise BadInput(f"journal {path}", "it must be JSON that an earlier run wrote", "name another file") from error
        if not all("|" in key for key in self.rows):
            raise BadInput(f"journal {path}", "its keys are not those of a journal, and nothing is written into other files", "name another file")

    def get(self, key: str) -> dict[str, Any] | None:
        return self.rows.get(f"{self.setting}|{key}")

    def put(self, key: str, row: dict[str, Any]) -> None:
        self.rows[f"{self.setting}|{key}"] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(self.rows, indent=1).encode())
