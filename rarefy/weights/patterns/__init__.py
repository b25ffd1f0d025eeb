"""patterns: one idea per file. `parse_pattern` turns a user's text into one of them."""

from __future__ import annotations

from rarefy.core import discover
from rarefy.core.errors import BadInput
from rarefy.core.roles import Pattern


def parse_pattern(text: str) -> Pattern:
    """The discovered pattern that `text` names.

    Raises:
        BadInput: no pattern knows the text; the message lists the known forms.

    >>> parse_pattern("2:4")
    NM(n=2, m=4)
    """
    known = discover.methods(Pattern)
    for pattern in known.values():
        found = pattern.parse(text.strip())
        if found is not None:
            return found
    raise BadInput(f"pattern {text!r}", f"known forms are {', '.join(known)}", "pass for example 2:4")
