"""The errors a user meets: what was given, the rule it broke, what to do instead."""

from __future__ import annotations


class RarefyError(ValueError):
    """One sentence for the user: the value, the rule, the remedy.

    The command line prints ``str(error)`` and exits with ``exit_code``, without a traceback.

    >>> str(RarefyError("density is 1.5", "a density lies in (0, 1]", "pass for example --density 0.5"))
    'density is 1.5: a density lies in (0, 1]; pass for example --density 0.5.'
    """

    exit_code = 2

    def __init__(self, value: str, rule: str, remedy: str = "") -> None:
        self.value, self.rule, self.remedy = value, rule, remedy
        text = f"{value}: {rule}" + (f"; {remedy}" if remedy else "")
        super().__init__(text.rstrip(".") + ".")


class BadInput(RarefyError):
    """Something that the user passed is wrong (shape, value, name, calibration data)."""


class BadFile(RarefyError):
    """A file is truncated, tampered with, hostile, or of an unknown version."""

    exit_code = 3


class MissingExtra(RarefyError):
    """An optional dependency is needed.

    >>> str(MissingExtra("transformers", "hub"))
    "transformers is not installed: this verb needs the extra 'hub'; run pip install 'rarefy[hub]'."
    """

    exit_code = 4

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed", f"this verb needs the extra {extra!r}", f"run pip install 'rarefy[{extra}]'")


class Refused(RarefyError):
    """The request is understood and would be wrong to carry out (a silent error elsewhere)."""

    exit_code = 5


class DiskError(Refused):
    """The disk is full, or what is named cannot be written there."""

    exit_code = 6
