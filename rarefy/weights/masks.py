"""Masks that were made elsewhere: read from torch.nn.utils.prune or a file, checked, and written into a model as exact zeros."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from rarefy.core.errors import BadFile, BadInput
from rarefy.core.records import Pruned, Site
from rarefy.weights.account import model_name, site_record
from rarefy.weights.checkpoint import unpack
from rarefy.weights.sites import find_sites

_MASK, _ORIG = "_mask", "_orig"  # what torch.nn.utils.prune calls the buffer and the parameter of a pruned `weight`
_NUMBERS = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.float16, torch.bfloat16)


def from_torch_prune(model: nn.Module) -> dict[str, Tensor]:
    """Take off every reparametrisation of `torch.nn.utils.prune`, in place, and return its masks.

    ``weight' = weight_orig where weight_mask != 0, else +0``. Afterwards the module is plain again: its state dict has the
    keys that it had before torch pruned it, and what was pruned is exactly zero. `torch.nn.utils.prune.remove` multiplies
    instead, which leaves a minus at zeros of negative weights and NaN where a pruned weight was infinite.

    Returns:
        {state-dict key: bool mask in the shape of the tensor, True = kept}, ready for `apply_masks`.

    Raises:
        BadInput: nothing in the model was pruned with torch.nn.utils.prune.

    >>> layer = nn.Linear(2, 1)
    >>> _ = torch_prune.custom_from_mask(layer, "weight", torch.tensor([[1.0, 0.0]]))
    >>> from_torch_prune(nn.Sequential(layer)), sorted(layer.state_dict())
    ({'0.weight': tensor([[ True, False]])}, ['bias', 'weight'])
    """
    masks = {}
    for path, module in model.named_modules():
        for stem in [name.removesuffix(_MASK) for name in module._buffers if name.endswith(_MASK)]:
            if stem + _ORIG in module._parameters:
                masks[f"{path}.{stem}" if path else stem] = _plain(module, stem)
    if not masks:
        raise BadInput(f"a {type(model).__name__}", "nothing in it was pruned with torch.nn.utils.prune", "pass the model before torch.nn.utils.prune.remove was called on it")
    return masks


def _plain(module: nn.Module, stem: str) -> Tensor:
    mask = module.get_buffer(stem + _MASK) != 0
    weight = module.get_parameter(stem + _ORIG).detach().masked_fill(~mask, 0)
    torch_prune.remove(module, stem)
    with torch.no_grad():
        module.get_parameter(stem).copy_(weight)
    return mask


def read_masks(path: str | Path) -> dict[str, Tensor]:
    """The masks of a safetensors file. Raises BadInput where there is no such file, BadFile where it is no safetensors file."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise BadInput(f"{path}", "no such file", "name a safetensors file of masks")
    try:
        with safe_open(file, "pt") as found:
            return {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise BadFile(str(path), f"it is not a safetensors file ({error})", "write the masks with safetensors.torch.save_file") from error


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write zeros where a mask is 0, in place, all masks or none: ``w' = w where mask, else +0``.

    Args:
        model: its weights are plain.
        masks: a name is the key of a matrix in the state dict, the path of its module, or that key with `_mask` as torch.nn.utils.prune
            writes it. The value has the shape of the tensor and holds 0 and 1 (bool or any number), 1 = kept; or it is one of `rarefy prune`'s
            masks.safetensors, packed bits.

    Returns:
        A record as `rarefy.weights.prune.prune`'s, of the masked matrices; errors are of the weights alone.

    Raises:
        BadInput: no masks; a name that the model has not or that comes twice; another shape; a value besides 0 and 1. The model is then as before.

    >>> layer = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> apply_masks(layer, {"0": torch.tensor([[True, False]])})["density"], int((layer[0].weight != 0).sum())
    (0.5, 1)
    """
    if not masks:
        raise BadInput("no masks", "at least one matrix must be named")
    sites: dict[str, list[Site]] = defaultdict(list)
    for site in find_sites(model, include=["*"]):
        sites[site.key].append(site)
        if site.expert is not None:
            sites[site.name].append(site)
    wanted: dict[str, tuple[Site, Tensor]] = {}
    for name, mask in masks.items():
        for site, kept in _read(name, mask, sites, model):
            if site.name in wanted:
                raise BadInput(f"the mask {name}", f"{site.name} has another one already", "pass one mask a matrix")
            wanted[site.name] = site, kept
    records = [_write(model, site, mask) for site, mask in wanted.values()]
    kept, total = sum(r["kept"] for r in records), sum(site.numel for site, _ in wanted.values())
    return {
        "model": model_name(model),
        "recipe": "masks",
        "pattern": "as given",
        "density_requested": kept / total,
        "density": kept / total,
        "emptied": [r["name"] for r in records if not r["kept"]],
        "sites": records,
    }


def _read(name: str, mask: Tensor, sites: Mapping[str, list[Site]], model: nn.Module) -> Iterator[tuple[Site, Tensor]]:
    """The sites that a mask is for, with its part [O, ..., I] for each."""
    key = next((k for k in _keys(name) if k in sites), None)
    if key is None:
        raise BadInput(f"the mask {name}", "the model has no such matrix", f"matrices are named like {next(iter(sites))}")
    if mask.dtype not in _NUMBERS:
        raise BadInput(f"the mask {name} of dtype {mask.dtype}", "a mask is bool, or numbers 0 and 1", "save it as torch.bool")
    here, expert = sites[key], key != sites[key][0].key
    parameter = model.get_parameter(here[0].key)
    shape = tuple(parameter.shape[1:] if expert else parameter.shape)
    if len(here) == 1 and mask.dtype == torch.uint8 and mask.shape == (-(-here[0].numel // 8),):
        yield here[0], unpack(mask, here[0].shape)
        return
    if tuple(mask.shape) != shape:
        raise BadInput(f"the mask {name} of shape {list(mask.shape)}", f"{key} has the shape {list(shape)}", "pass a mask of that shape")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise BadInput(f"the mask {name}", "it holds values besides 0 and 1", "pass 1 where a weight is kept and 0 where it is not")
    for site in here:
        yield site, mask.bool().permute(site.axes) if expert else site.read(mask.bool())


def _keys(name: str) -> Iterable[str]:
    return (name, f"{name}.weight", name.removesuffix(_MASK))


def _write(model: nn.Module, site: Site, mask: Tensor) -> dict[str, Any]:
    parameter = model.get_parameter(site.key)
    mask = mask.to(parameter.device)
    with torch.no_grad():
        dense = site.read(parameter.detach()).float().clone()
        site.write(parameter, site.read(parameter.detach()).masked_fill(~mask, 0))
    after = site.read(parameter.detach())
    return site_record(site, dense, Pruned(after.float(), mask, None), parameter.dtype, {}, idle=False)
