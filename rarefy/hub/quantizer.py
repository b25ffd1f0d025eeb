"""Our quantizer for transformers: replays the plan before the weights load, proves the bytes after."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from rarefy.core.errors import BadFile
from rarefy.hub.packed import PackedLinear, replace
from rarefy.hub.plan import METHOD, VERSION, Layer, parse

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@register_quantization_config(METHOD)
class RarefyConfig(QuantizationConfigMixin):
    """The plan as transformers keeps it. Raises BadFile where a field breaks the format."""

    def __init__(self, version: int = VERSION, layers: dict[str, Any] | None = None, **_: Any) -> None:
        self.quant_method = cast(QuantizationMethod, METHOD)
        self.version = version
        self.layers = {} if layers is None else layers
        parse(self.version, self.layers)


@register_quantizer(METHOD)
class RarefyQuantizer(HfQuantizer):
    """Swaps packed layers in, and verifies size, checksum and bit count of each."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        _refuse_pickles(kwargs.get("checkpoint_files") or ())
        for path, layer in self._plan().items():
            linear = _linear(model, path, layer)
            packed = torch.empty(layer.bytes, dtype=torch.uint8, device=linear.weight.device)
            replace(model, path, PackedLinear(layer, packed, linear.bias))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for path, layer in self._plan().items():
            layer.verify(model.get_submodule(path).weight, f"{path}.weight")
        return model

    def _plan(self) -> dict[str, Layer]:
        config: Any = self.quantization_config
        return parse(config.version, config.layers)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _linear(model: nn.Module, path: str, layer: Layer) -> nn.Linear:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise BadFile(f"the plan of {path}", "the model has no such module", "write the folder again") from error
    if type(module) is not nn.Linear or (module.out_features, module.in_features) != layer.shape:
        raise BadFile(f"shape {list(layer.shape)} of {path}", f"the model has {tuple(getattr(module, 'weight', torch.empty(0)).shape)} there", "write the folder again")
    return module


def _refuse_pickles(files: Any) -> None:
    for folder in {Path(file).parent for file in files}:
        for file in sorted(folder.iterdir()):
            if file.suffix in PICKLED:
                raise BadFile(str(file.name), "a packed folder holds safetensors only, and this file may run code", "delete it")
