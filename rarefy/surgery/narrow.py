"""Narrow: hidden units of one MLP are taken out, and its matrices are really smaller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.attach import plain_type, viewed
from rarefy.core.errors import BadInput, Refused
from rarefy.core.modes import evaluating

_EDITS = "_rarefy_edits"


@dataclass(frozen=True)
class Narrow:
    """`width` hidden units became `kept`: outputs of the matrices at `rows`, inputs of those at `columns`."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    width: int
    kept: int


def narrow(model: nn.Module, units: Mapping[str, Sequence[int] | Tensor], *, coupled: Mapping[str, tuple[Sequence[str], Sequence[str]]] | None = None) -> nn.Module:
    """Take hidden units out of MLPs, in place: rows of the matrices that make them, columns of those that read them.

    ``y = W_down[:, kept] (act(W_gate[kept] x) * W_up[kept] x)``, which is the dense MLP with every other unit's column of W_down at zero.

    Args:
        model: any module of plain Linear or Conv1D matrices.
        units: {path of an MLP: indices in 0 .. I-1 of the units that stay, ascending or not}. The matrices are those
            children of the MLP that share one width I, as outputs of one or more and inputs of one; that they are
            coupled unit by unit is tried on random rows.
        coupled: {path: (paths whose outputs, paths whose inputs are the units)} where the children cannot be found;
            taken at its word.

    Returns:
        The model, whose narrowed parameters are new ones (make the optimizer afterwards); `edits` lists what was done, and `rarefy.hub.packed.save_packed` writes it into the plan.

    Raises:
        BadInput: no such MLP; indices that repeat, lie outside or leave nothing.
        Refused: the matrices cannot be found, mix units, are tied, packed or under a view.

    >>> mlp = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> narrow(mlp, {"": [0, 2, 5]})
    Sequential(
      (0): Linear(in_features=2, out_features=3, bias=True)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    )
    """
    planned: list[tuple[Narrow, Tensor]] = []
    for path, kept in units.items():
        rows, columns = coupled[path] if coupled is not None and path in coupled else _find(model, path)
        index = _index(path, kept, width := _width(model, rows, columns))
        if any(set(rows) & set(edit.rows) or set(columns) & set(edit.columns) for edit, _ in planned):
            raise Refused(f"the units of {path!r}", "another path names the same matrices", "narrow them one after the other")
        planned.append((Narrow(tuple(rows), tuple(columns), width, index.numel()), index))
    for edit, index in planned:
        _apply(model, edit, index)
    return model


def edits(model: nn.Module) -> tuple[Narrow, ...]:
    """The edits of a model, in the order they were made."""
    found: tuple[Narrow, ...] = model.__dict__.get(_EDITS, ())
    return found


def replay(model: nn.Module, edit: Narrow) -> None:
    """Give a model the shapes of an edit, whatever its values: for weights that are loaded afterwards.

    Raises:
        BadInput: the model has no such matrices of that width, or the edit does not make them narrower.
    """
    try:
        width = _width(model, edit.rows, edit.columns)
    except Refused as error:
        raise BadInput(error.value, error.rule, error.remedy) from error
    if width != edit.width or not 0 < edit.kept < edit.width:
        raise BadInput(f"narrowing {', '.join(edit.rows)} from {edit.width} to {edit.kept}", f"the model has {width} units there, and 1 to {width - 1} may stay")
    _apply(model, edit, torch.arange(edit.kept))


def widen(model: nn.Module) -> nn.Module:
    """Undo every `narrow` in place with units of zeros at the end: the same function up to rounding, in the shapes of the config."""
    for edit in reversed(edits(model)):
        for path in edit.rows:
            _resize(model.get_submodule(path), "out", lambda t, axis, edit=edit: _padded(t, axis, edit.width))
        for path in edit.columns:
            _resize(model.get_submodule(path), "in", lambda t, axis, edit=edit: _padded(t, axis, edit.width))
    model.__dict__.pop(_EDITS, None)
    return model


def _apply(model: nn.Module, edit: Narrow, index: Tensor) -> None:
    for path in edit.rows:
        _resize(model.get_submodule(path), "out", lambda t, axis: t.index_select(axis, index.to(t.device)))
    for path in edit.columns:
        _resize(model.get_submodule(path), "in", lambda t, axis: t.index_select(axis, index.to(t.device)))
    model.__dict__[_EDITS] = (*edits(model), edit)


def _axes(module: nn.Module) -> dict[str, int] | None:
    """Which axis of the weight are outputs and inputs; None where it is no matrix of ours."""
    kind = plain_type(module)
    if kind is nn.Linear:
        return {"out": 0, "in": 1}
    return {"out": 1, "in": 0} if kind.__name__ == "Conv1D" and hasattr(module, "nf") else None


def _count(module: nn.Module, side: str) -> int:
    axes, weight = _axes(module), module._parameters.get("weight")
    return weight.shape[axes[side]] if axes is not None and weight is not None else -1


def _resize(module: Any, side: str, change: Any) -> None:
    axes = _axes(module)
    assert axes is not None
    with torch.no_grad():
        old = module._parameters["weight"]
        module._parameters["weight"] = nn.Parameter(change(old, axes[side]).contiguous(), old.requires_grad)
        bias = module._parameters.get("bias")
        if side == "out" and bias is not None:
            module._parameters["bias"] = nn.Parameter(change(bias, 0).contiguous(), bias.requires_grad)
    name = ({"out": "out_features", "in": "in_features"} if hasattr(module, "out_features") else {"out": "nf", "in": "nx"})[side]
    setattr(module, name, module._parameters["weight"].shape[axes[side]])


def _padded(tensor: Tensor, axis: int, width: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = width - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)


def _index(path: str, kept: Sequence[int] | Tensor, width: int) -> Tensor:
    index = torch.as_tensor(kept, dtype=torch.long).flatten().cpu()
    if index.numel() == 0 or len(set(index.tolist())) < index.numel() or int(index.min()) < 0 or int(index.max()) >= width or index.numel() == width:
        raise BadInput(f"{index.numel()} units of {path!r}", f"what stays are distinct indices below {width}, at least one and not all")
    return index


def _width(model: nn.Module, rows: Sequence[str], columns: Sequence[str]) -> int:
    modules = dict(model.named_modules())
    sides = [(p, "out") for p in rows] + [(p, "in") for p in columns]
    if not rows or not columns or len(set(sides)) < len(sides) or any(p not in modules or _axes(modules[p]) is None for p, _ in sides):
        raise Refused(f"units of {', '.join([*rows, *columns]) or 'nothing'}", "they are outputs of Linear or Conv1D matrices and inputs of others, each named once")
    widths = {_count(modules[p], side) for p, side in sides}
    if len(widths) != 1:
        raise Refused(f"units of {', '.join([*rows, *columns])}", f"their widths are {sorted(widths)}, and coupled matrices share one")
    mine = {id(modules[p]._parameters["weight"]) for p, _ in sides}
    for path, module in modules.items():
        if path not in {p for p, _ in sides} and any(id(t) in mine for t in module._parameters.values()):
            raise Refused(f"the matrix of {path}", "it shares its tensor with one to narrow", "untie it first")
    for key in viewed(model):
        if key.rpartition(".")[0] in {p for p, _ in sides}:
            raise Refused(f"{key}", "it is under a view", "export or detach the view first")
    return widths.pop()


def _find(model: nn.Module, path: str) -> tuple[list[str], list[str]]:
    """The children of an MLP that make its hidden units and the one that reads them."""
    mlp = dict(model.named_modules()).get(path)
    if mlp is None:
        raise BadInput(f"MLP {path!r}", "the model has no such module", "take a path from model.named_modules()")
    prefix = f"{path}." if path else ""
    matrices = {name: m for name, m in mlp.named_children() if _axes(m) is not None}
    found = []
    for width in {_count(m, "out") for m in matrices.values()}:
        rows = [n for n, m in matrices.items() if _count(m, "out") == width]
        columns = [n for n, m in matrices.items() if _count(m, "in") == width]
        order = list(matrices)
        if len(columns) == 1 and rows and len(rows) == len(matrices) - 1 and max(map(order.index, rows)) < order.index(columns[0]):
            found.append((rows, columns))
    if len(found) != 1:
        raise Refused(f"the units of {path!r}", f"its matrices {', '.join(matrices) or '(none)'} do not share one hidden width", "name the coupled matrices")
    rows, columns = found[0]
    _try(path, mlp, [matrices[n] for n in rows], matrices[columns[0]])
    return [prefix + n for n in rows], [prefix + n for n in columns]


def _try(path: str, mlp: nn.Module, rows: Sequence[nn.Module], reader: nn.Module) -> None:
    """Refuse unless unit j of the reader's input depends on output j of each maker and on no other."""
    weight = reader._parameters["weight"]
    assert weight is not None
    if weight.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, _count(rows[0], "in"), generator=generator).to(weight)
    seen: list[Tensor] = []
    odd = torch.arange(_count(reader, "in"), device=weight.device) % 2 == 1
    hooks = [reader.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))]
    try:
        with torch.no_grad(), evaluating(mlp):
            mlp(x)
            hooks += [m.register_forward_hook(lambda _, args, y: torch.where(odd, y + 1, y)) for m in rows]
            mlp(x)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise Refused(f"the units of {path!r}", "it cannot be run on rows [R, H] alone to see whether its matrices are coupled", "name the coupled matrices") from error
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != 2 or seen[0].shape[-1] != odd.numel() or not torch.equal(seen[0][..., ~odd], seen[1][..., ~odd]):
        raise Refused(f"the units of {path!r}", "what makes them mixes them before they are read", "name the coupled matrices if that is meant")
