"""Which tensors of a model may become sparse, as `Site` records in forward-friendly order of module path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from rarefy.core.errors import BadInput
from rarefy.core.records import Site

EXPERT_TENSORS = ("gate_up_proj", "up_proj", "down_proj")
_CONV_AXES = {nn.Conv1d: (0, 2, 1), nn.Conv2d: (0, 2, 3, 1), nn.Conv3d: (0, 2, 3, 4, 1)}


def find_sites(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Site]:
    """The sites of a model: Linear and convolution weights, transformers' Conv1D, experts of fused 3-D tensors.

    In a model with an output head (`get_output_embeddings`) the head, embeddings and expert routers are left out
    unless `include` names them; so is every tensor tied to one of them. A tied tensor appears once.

    Args:
        model: any module; weights may be on the meta device.
        include: glob patterns over module paths; where given, only matching modules, heads and embeddings too.
        exclude: glob patterns over module paths that are left out.

    Returns:
        Site records in the order of `named_modules`.

    Raises:
        BadInput: a pattern matches no module that could be a site, or nothing is left.

    >>> [s.name for s in find_sites(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))]
    ['0.weight', '2.weight']
    """
    found = [(path, module, site) for path, module in model.named_modules() for site in _sites_of(path, module)]
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(path, pattern) for path, _, _ in found):
            raise BadInput(f"module pattern {pattern!r}", "it matches no module with a weight that can be pruned", f"modules are named like {found[0][0] if found else '(none)'!r}")
    kept, seen = [], set()
    spared = set() if include else _spared_tensors(model)
    for path, module, site in found:
        tensor = getattr(module, site.param)
        wanted = any(fnmatchcase(path, p) for p in include) if include else not isinstance(module, nn.Embedding) and id(tensor) not in spared
        if wanted and not any(fnmatchcase(path, p) for p in exclude) and (id(tensor), site.expert) not in seen:
            seen.add((id(tensor), site.expert))
            kept.append(site)
    if not kept:
        raise BadInput(f"a {type(model).__name__} without a site", "there must be a Linear, convolution, embedding or fused expert tensor to prune", "check include and exclude")
    return kept


def _sites_of(path: str, module: Any) -> Iterator[Site]:
    prefix = f"{path}." if path else ""
    for kind, axes in _CONV_AXES.items():
        if type(module) is kind:
            yield Site(f"{prefix}weight", path, "weight", _permuted(module.weight, axes), axes, role="conv")
    if isinstance(module, (nn.Linear, nn.Embedding)):
        yield Site(f"{prefix}weight", path, "weight", tuple(module.weight.shape), role="embedding" if isinstance(module, nn.Embedding) else "linear")
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor):
        yield Site(f"{prefix}weight", path, "weight", _permuted(module.weight, (1, 0)), (1, 0))
    for param in EXPERT_TENSORS:
        tensor = getattr(module, param, None)
        if isinstance(tensor, nn.Parameter) and tensor.dim() == 3:
            axes = (1, 0) if getattr(module, "is_transposed", False) else (0, 1)
            for expert in range(tensor.shape[0]):
                yield Site(f"{prefix}{param}", path, param, _permuted(tensor[expert], axes), axes, expert, "expert")


def _permuted(tensor: Tensor, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(tensor.shape[a] for a in axes)


def _spared_tensors(model: Any) -> set[int]:
    """Heads and embeddings of a language model, and expert routers: not pruned unless asked."""
    if not hasattr(model, "get_input_embeddings"):
        return set()
    owners = [model.get_input_embeddings(), model.get_output_embeddings()]
    owners += [m for m in model.modules() if isinstance(m, nn.Embedding)]
    for module in model.modules():
        if any(isinstance(child, nn.Module) and any(True for _ in _expert_tensors(child)) for child in module.children()):
            owners += [c for n, c in module.named_children() if n in ("gate", "router", "shared_expert_gate")]
    block_path = {id(m) for chain in model.modules() if isinstance(chain, nn.ModuleList) for m in chain.modules()}
    outside = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in block_path]
    return {id(p) for owner in (*owners, *outside) if owner is not None for p in owner.parameters()}


def _expert_tensors(module: nn.Module) -> Iterator[Tensor]:
    for param in EXPERT_TENSORS:
        tensor = getattr(module, param, None)
        if isinstance(tensor, nn.Parameter) and tensor.dim() == 3:
            yield tensor
