"""Our quantizer for transformers: replays the plan before the weights load, proves the bytes after."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from rarefy.core.attach import PREFIX, attach_gate, gated
from rarefy.core.errors import BadFile, BadInput
from rarefy.core.roles import Gate
from rarefy.hub.packed import dequantize, matrix, packed_kind, replace, unchanged
from rarefy.hub.plan import METHOD, NAMED, Layer, Plan, parse
from rarefy.hub.tensors import check_folder, headers, stored
from rarefy.surgery.narrow import replay

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@register_quantization_config(NAMED)
@register_quantization_config(METHOD)
class RarefyConfig(QuantizationConfigMixin):
    """The plan as transformers keeps it. Raises BadFile where a field breaks the format."""

    def __init__(self, quant_method: str = METHOD, **fields: Any) -> None:
        parse(fields)
        self.quant_method = cast(QuantizationMethod, METHOD)
        self.fields = tuple(fields)
        for name, value in fields.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": NAMED, **{name: copy.deepcopy(getattr(self, name)) for name in self.fields}}

    def plan(self) -> Plan:
        with torch.device("cpu"):  # transformers builds the skeleton under the meta device
            return parse({name: getattr(self, name) for name in self.fields})


@register_quantizer(NAMED)
@register_quantizer(METHOD)
class RarefyQuantizer(HfQuantizer):
    """Replays edits, packed layers and gates; verifies every tensor, and size and bit count of the packed ones."""

    requires_calibration = False
    holds_gates = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        plan = self._plan()
        files = [Path(os.path.abspath(file)) for file in kwargs.get("checkpoint_files") or ()]
        _check_folders(str(getattr(model.config, "_name_or_path", "")), files)
        _check_tensors(plan, files)
        for edit in plan.edits:
            try:
                replay(model, edit)
            except BadInput as error:
                raise BadFile(error.value, error.rule, "write the folder again") from error
        for path, layer in plan.layers.items():
            module, kind = _module(model, path, layer)
            packed = torch.empty(layer.bytes, dtype=torch.uint8, device=module.weight.device)
            replace(model, path, kind(layer, packed, getattr(module, "bias", None)))
        for place, gate in plan.gates.items():
            try:
                attach_gate(model, place, copy.deepcopy(gate))
            except BadInput as error:
                raise BadFile(f"the gate on {place}", "the model has no such module", "write the folder again") from error
        _check_shapes(model, files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        plan = self._plan()
        for path, layer in plan.layers.items():
            layer.verify(model.get_submodule(path).weight, f"{path}.weight")
        live, state = gated(model), model.state_dict()
        for key in plan.tensors:
            if f".{PREFIX}" in key and key not in state:
                raise BadFile(f"tensor {key}", "the plan has no gate that owns it", "write the folder again")
        for path, gate in plan.gates.items():
            if not _same(live[path], gate):
                raise BadFile(f"the gate on {path}", f"its tensors are not those of the plan's settings {gate.settings()}", "write the folder again")
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        unchanged(model, self._plan())
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """`model.dequantize()` of transformers; raises as `rarefy.hub.packed.dequantize`."""
        return dequantize(model)

    def _plan(self) -> Plan:
        config: Any = self.quantization_config
        plan: Plan = config.plan()
        return plan

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside packed layers train (`rarefy.hub.peft`); transformers refuses to train a quantised model without any."""
        return True


def _same(live: Gate, planned: Gate) -> bool:
    """Whether two gates agree in every tensor that settings determine, in the dtype that the live one was loaded in."""
    mine, theirs = live.state_dict(), planned.state_dict()
    return all(torch.equal(mine[key].cpu(), theirs[key].to(mine[key].dtype)) for key in theirs if key not in planned.stored)


def _module(model: nn.Module, path: str, layer: Layer) -> tuple[Any, Any]:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise BadFile(f"the plan of {path}", "the model has no such module", "write the folder again") from error
    kind = packed_kind(module)
    if kind is None or tuple(matrix(module).shape) != layer.shape:
        there = tuple(getattr(module, "weight", torch.empty(0)).shape) if kind is None else tuple(matrix(module).shape)
        raise BadFile(f"shape {list(layer.shape)} of {path}", f"the model has {there} there", "write the folder again")
    return module, kind


def _check_folders(where: str, files: Sequence[Path]) -> None:
    home = [Path(os.path.abspath(where))] if where and Path(where).is_dir() else []
    for folder in dict.fromkeys([*home, *(file.parent for file in files)]):
        check_folder(folder)
        for file in sorted(folder.iterdir()):
            if file.suffix in PICKLED:
                raise BadFile(str(file.name), "a packed folder holds safetensors only, and this file may run code", "delete it")
    for file in files:
        if home and not file.is_relative_to(home[0]):
            raise BadFile(str(file), f"it lies outside of {where}", "write the folder again")


def _check_tensors(plan: Plan, files: Sequence[Path]) -> None:
    if not plan.tensors or not files:
        return
    found = stored(files)
    for key in sorted({*plan.tensors, *found}):
        if key not in found or key not in plan.tensors:
            here, there = ("the files", "the plan") if key in found else ("the plan", "the files")
            raise BadFile(f"tensor {key[:80]}", f"it is in {here} and not in {there}", "write the folder again")
        if found[key].seal() != plan.tensors[key]:
            raise BadFile(f"tensor {key}", "its sha256, dtype or shape is not the plan's", "the file is damaged; download or write it again")


def _check_shapes(model: nn.Module, files: Sequence[Path]) -> None:
    """Name the tensor that does not fit the edited skeleton; transformers would, in many lines."""
    state = model.state_dict()
    for key, tensor in headers(files).items():
        if key in state and tuple(state[key].shape) != tensor.shape:
            raise BadFile(f"tensor {key} of shape {list(tensor.shape)}", f"config and plan build {list(state[key].shape)} there", "write the folder again")
