"""Gates on the inputs of a model's matrices, calibrated on what those inputs are."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from rarefy.activations.rows import collect_rows
from rarefy.core.attach import attach_gate, gated, plain_type
from rarefy.core.errors import BadInput, Refused
from rarefy.core.roles import Gate


def attach_gates(model: nn.Module, gate: Gate, at: Sequence[str], batches: Iterable[Mapping[str, Tensor]] = ()) -> dict[str, float | None]:
    """Put a copy of `gate` on the input of every Linear (or Conv1D) that a glob of `at` matches.

    Save with `rarefy.hub.packed.save_packed`: a plain folder cannot hold a gate.

    With batches, each copy is calibrated on at most 2,048 rows [R, C] of what its module saw in the model without gates.

    Args:
        model: any module; changed in place.
        gate: the prototype.
        at: glob patterns over module paths.
        batches: keyword arguments of the model; `attention_mask` marks the tokens that are not padding.

    Returns:
        {path: the fraction of the calibration activations that is not zero after the gate, or None without batches}.

    Raises:
        BadInput: a pattern matches no module, a module saw no rows, or the gate needs batches and there are none.
        Refused: a module has a gate already.

    >>> from rarefy.activations.gates.threshold import Threshold
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> attach_gates(model, Threshold(), ["0"])
    {'0': None}
    """
    paths = _matched(model, at)
    for path in set(paths) & set(gated(model)):
        raise Refused(f"module {path!r}", "an input has one gate", "detach the first one")
    rows = collect_rows(model, paths, batches)
    if gate.needs_rows and not rows:
        raise BadInput(f"{gate!r}", "it is open until it is calibrated", "pass calibration batches")
    kept = {}
    for path in paths:
        mine = copy.deepcopy(gate).to(next(model.get_submodule(path).parameters()).device)
        if path in rows:
            mine.calibrate(rows[path])
            kept[path] = float((mine(rows[path]) != 0).double().mean())
        attach_gate(model, path, mine)
    return {path: kept.get(path) for path in paths}


def _matched(model: nn.Module, at: Sequence[str]) -> list[str]:
    found = [path for path, module in model.named_modules() if issubclass(plain_type(module), nn.Linear) or plain_type(module).__name__ == "Conv1D"]
    for pattern in at:
        if not any(fnmatchcase(path, pattern) for path in found):
            raise BadInput(f"gates at {pattern!r}", "no Linear or Conv1D has such a path", f"modules are named like {found[0] if found else '(none)'!r}")
    return [path for path in found if any(fnmatchcase(path, pattern) for pattern in at)]
