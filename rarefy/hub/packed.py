"""Packed linear layers: the zeros are not stored, the results are the dense layer's bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.core.errors import BadInput, MissingExtra
from rarefy.hub.atomic import atomic_folder
from rarefy.hub.plan import DTYPES, Layer
from rarefy.layouts import LAYOUTS
from rarefy.weights.sites import find_sites

RECORD = "pack.json"


class PackedLinear(nn.Module):
    """A Linear whose `weight` is uint8 [bytes]; each forward unpacks it and calls `torch.nn.functional.linear`."""

    bias: nn.Parameter | None

    def __init__(self, layer: Layer, packed: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.layer = layer
        self.out_features, self.in_features = layer.shape
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", bias)

    def dense(self) -> Tensor:
        """The weight [out, in]."""
        return LAYOUTS[self.layer.layout].unpack(self.weight, self.layer.shape, DTYPES[self.layer.dtype])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype), self.bias)


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def save_packed(model: Any, tokenizer: Any, out: str | Path, layout: str = "bitmask", *, force: bool = False) -> dict[str, Any]:
    """Save a transformers model with its sparse Linear layers packed; the model itself is left as it was.

    A layer is packed where that is smaller than the dense tensor; the others stay dense, and the record says why.

    Returns:
        The record: layout, bytes before and after, and per site its density, bytes and the reason where it stays dense.

    Raises:
        BadInput: unknown layout, or a model that is already quantised.
        Refused: as `rarefy.hub.atomic.check_target`.
    """
    if layout not in LAYOUTS:
        raise BadInput(f"layout {layout!r}", f"known layouts are {', '.join(LAYOUTS)}", "pass one of them")
    try:
        from rarefy.hub.quantizer import RarefyConfig
    except ModuleNotFoundError as error:
        raise MissingExtra("transformers", "hub") from error
    if getattr(model.config, "quantization_config", None) is not None:
        raise BadInput("a quantised model", "only plain weights can be packed", "dequantize it first")
    sites, dense = [], {}
    for path, module in _linears(model):
        layer, packed, site = _pack(path, module, layout)
        sites.append(site)
        if layer is not None:
            dense[path] = module
            replace(model, path, PackedLinear(layer, packed, module.bias))
    record = {
        "layout": layout,
        "bytes_dense": sum(s["bytes_dense"] for s in sites),
        "bytes_stored": sum(s["bytes"] for s in sites),
        "packed": len(dense),
        "sites": sites,
    }
    try:
        layers = {path: model.get_submodule(path).layer.to_dict() for path in dense}
        if layers:
            model.config.quantization_config = RarefyConfig(layers=layers)
        with atomic_folder(Path(out), force=force) as draft:
            model.save_pretrained(draft)
            if tokenizer is not None:
                tokenizer.save_pretrained(draft)
            (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    finally:
        for path, module in dense.items():
            replace(model, path, module)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return record


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for site in find_sites(model):
        module = model.get_submodule(site.module)
        if type(module) is nn.Linear:
            yield site.module, module


def _pack(path: str, module: nn.Linear, layout: str) -> tuple[Layer | None, Tensor, dict[str, Any]]:
    weight = module.weight.detach()
    packed = LAYOUTS[layout].pack(weight)
    before = weight.numel() * weight.element_size()
    site = {"name": f"{path}.weight", "density": int(torch.count_nonzero(weight)) / weight.numel(), "bytes_dense": before}
    if packed.numel() >= before:
        return None, packed, {**site, "bytes": before, "dense_because": "packed it would be no smaller"}
    return Layer.of(weight, packed, layout), packed, {**site, "bytes": packed.numel(), "dense_because": None}


def dequantize(model: Any) -> Any:
    """Replace every packed layer by a plain Linear, in place; afterwards the model saves as plain dense weights."""
    for path, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            linear.weight = nn.Parameter(module.dense())
            linear.register_parameter("bias", module.bias)
            replace(model, path, linear.train(module.training))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model
