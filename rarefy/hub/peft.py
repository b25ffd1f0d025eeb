"""LoRA of the library peft on packed layers: the packed bytes stay as they are, the adapters beside them train."""

from __future__ import annotations

import copy
from typing import Any

from rarefy.core.errors import MissingExtra, Refused
from rarefy.hub.packed import PackedConv1D, PackedEmbedding, PackedLinear

_PLAIN_FIRST = "make the model plain first with rarefy.hub.packed.dequantize, then attach the adapters"


def on_packed(config: Any) -> Any:
    """A copy of peft's LoraConfig whose targets may be packed layers: ``y = x W^T + b + scaling B(A(x))`` with W packed.

    `get_peft_model(model, on_packed(LoraConfig(...)))` trains what it would train on a Linear, A [r, in] and B [out, r], with the
    same gradients. An adapter folder is read by `PeftModel.from_pretrained(model, folder, config=on_packed(LoraConfig.from_pretrained(folder)))`.

    Raises:
        MissingExtra: peft is not installed.
        Refused: a kind of adapter that reads the dense weight (DoRA, or an initialisation from it); from the model that is made,
            merging into packed bytes, and a packed embedding as a target.
    """
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise MissingExtra("peft", "peft") from error
    if not isinstance(config, LoraConfig):
        raise Refused(f"a {type(config).__name__} on packed layers", "only LoRA is added to what they compute", "pass a LoraConfig")
    for name, plain in {"use_dora": False, "init_lora_weights": (True, False, "gaussian", "orthogonal")}.items():
        value = getattr(config, name)
        if not (value in plain if isinstance(plain, tuple) else value == plain):
            raise Refused(f"{name}={value!r} on packed layers", "it reads the dense weight", _PLAIN_FIRST)
    made = copy.deepcopy(config)
    made._register_custom_module({PackedLinear: _adapted(), PackedConv1D: _adapted(), PackedEmbedding: _embedding})
    return made


def _embedding(target: Any, adapter_name: str, **kwargs: Any) -> Any:
    raise Refused(f"LoRA on {target}", "rows are read from it and nothing is multiplied", "name linear layers as target_modules")


def _adapted() -> type[Any]:
    from peft.tuners.lora.layer import Linear

    class PackedLora(Linear):
        """peft's LoRA around a packed layer, which it calls and whose bytes it does not read."""

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            raise Refused(f"merging an adapter into {self.get_base_layer()}", "its weights are packed, and a sum has other zeros", _PLAIN_FIRST)

        def unmerge(self) -> None:
            """Nothing is ever merged."""

    return PackedLora
