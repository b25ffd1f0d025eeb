"""Where a matrix is: its block, and what the same matrix is called in every block."""

from __future__ import annotations

import re

OUTSIDE = "outside the blocks"
_BLOCK = re.compile(r"((?:[^.]+\.)*?\d+)\.(.+)")
_EXPERT = re.compile(r"\[(\d+)\]$")


def split_name(name: str) -> tuple[str, str]:
    """(block, the rest) of the name of a site.

    >>> split_name("model.layers.3.mlp.experts.7.up_proj.weight"), split_name("lm_head.weight")
    (('model.layers.3', 'mlp.experts.7.up_proj'), ('outside the blocks', 'lm_head'))
    """
    found = _BLOCK.fullmatch(name)
    block, rest = (found[1], found[2]) if found else (OUTSIDE, name)
    return block, rest.removesuffix(".weight")


def kind_of(name: str) -> str:
    """What the same matrix of every block, and of every expert, is called.

    >>> kind_of("model.layers.3.mlp.experts.7.up_proj.weight"), kind_of("model.layers.3.mlp.experts.down_proj[7]")
    ('mlp.experts.up_proj', 'mlp.experts.down_proj')
    """
    rest = _EXPERT.sub("", split_name(name)[1])
    return ".".join(part for part in rest.split(".") if not part.isdigit())


def tensor_of(name: str) -> tuple[str, int | None]:
    """(key of the tensor that holds it, which expert's slice of it).

    >>> tensor_of("experts.down_proj[7]"), tensor_of("lm_head.weight")
    (('experts.down_proj', 7), ('lm_head.weight', None))
    """
    found = _EXPERT.search(name)
    return (name, None) if found is None else (name[: found.start()], int(found[1]))
