"""What a page is made of, before it is HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rarefy.probes.html import Section, document
from rarefy.probes.magnitudes import Magnitudes


@dataclass(frozen=True)
class Facts:
    """What the files say beside the record: bytes of the weights on disk, how large the weights are."""

    bytes: int = 0
    sizes: Sequence[Magnitudes] = ()


@dataclass(frozen=True)
class Page:
    """A title, what is said first (HTML), sections, and what is claimed."""

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]
    foot: str

    def html(self) -> str:
        return document(self.title, self.lead, self.sections, self.foot)
