"""What llama.cpp has a place for: architectures, the fields that it needs, and the name of each tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.core.attach import gated, plain_type, viewed
from rarefy.core.errors import BadInput, Refused
from rarefy.hub.llama_fields import FIELDS
from rarefy.hub.packed import PackedEmbedding, PackedLinear, packed_kind


@dataclass(frozen=True)
class Architecture:
    """llama.cpp's name; whether it turns neighbouring channels of a head, so that rows of q and k are put in another order; its name where MLPs differ in width."""

    name: str
    neighbours: bool
    uneven: str | None = None


LLAMA = Architecture("llama", True, "deci")
ARCHITECTURES = {"LlamaForCausalLM": LLAMA, "MistralForCausalLM": LLAMA, "Qwen2ForCausalLM": Architecture("qwen2", False)}
SCALED = {"default": None, "linear": "linear", "llama3": None}  # {rope_type: what llama.cpp calls it}; llama3 is a tensor


@dataclass(frozen=True)
class Head:
    """Sizes of the attention: heads, those of keys and values, channels of one."""

    heads: int
    shared: int
    channels: int

    @classmethod
    def of(cls, config: Any) -> Head:
        heads = config.num_attention_heads
        return cls(heads, config.num_key_value_heads or heads, getattr(config, "head_dim", None) or config.hidden_size // heads)


@dataclass(frozen=True)
class Place:
    """A tensor: its name here and in the file, the module and the parameter, and for how many heads rows are put in another order (0: for none)."""

    key: str
    name: str
    module: Any
    parameter: str
    heads: int


def architecture(model: Any) -> Architecture:
    """How llama.cpp computes the model.

    Raises:
        BadInput: an architecture or a config field that it is not exported for; it is named.
        Refused: gates or views, which a GGUF file cannot hold.
    """
    kind = plain_type(model).__name__
    if kind not in ARCHITECTURES:
        raise BadInput(f"a {kind}", f"a GGUF file is written for {', '.join(ARCHITECTURES)}", "use llama.cpp's own converter")
    for field, allowed in FIELDS.items():
        value = getattr(model.config, field, allowed[0])
        if value not in allowed:
            raise BadInput(f"{field}={value!r} of the config", f"a GGUF file is written for {field}={allowed[0]!r}", "use llama.cpp's own converter")
    if _rope(model.config) not in SCALED:
        raise BadInput(f"rope_type={_rope(model.config)!r} of the config", f"a GGUF file is written for {', '.join(SCALED)}", "use llama.cpp's own converter")
    for place in gated(model):
        raise Refused(f"the gate on {place}", "llama.cpp would run the model without it", "run rarefy unpack --drop-gates first, which makes another model of it")
    for key in viewed(model):
        raise Refused(f"the view on {key}", "a file holds plain weights", "export inside `with exported(model)`")
    return ARCHITECTURES[kind]


def widths(model: Any) -> list[int]:
    """Hidden units of the MLP of each layer."""
    return [layer.mlp.down_proj.in_features for layer in model.model.layers]


def named(model: Any, found: Architecture) -> str:
    """The architecture of the file: another one where layers differ in width, since llama.cpp reads one width for all of them in `llama`."""
    if len(set(widths(model))) == 1:
        return found.name
    if found.uneven is None:
        raise Refused(f"MLPs of {min(widths(model))} to {max(widths(model))} units", f"llama.cpp reads one width for all layers of a {found.name}", "run rarefy unpack first")
    return found.uneven


def describe(writer: Any, model: Any, name: str) -> None:
    """Sizes and constants, into the file's header."""
    config, head, width = model.config, Head.of(model.config), widths(model)
    even = len(set(width)) == 1
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(width[0] if even else width)
    writer.add_head_count(head.heads if even else [head.heads] * len(width))
    writer.add_head_count_kv(head.shared if even else [head.shared] * len(width))
    writer.add_key_length(head.channels)
    writer.add_value_length(head.channels)
    writer.add_rope_dimension_count(head.channels)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    scaled = SCALED[_rope(config)]
    if scaled is not None:
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType(scaled))
        writer.add_rope_scaling_factor(float(rope["factor"]))


def places(model: Any, found: Architecture) -> Iterator[Place]:
    """Every tensor once, a tied head not at all.

    Raises:
        Refused: a tensor that llama.cpp has no place for, or a layer of a kind that it would not compute.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == named(model, found))
    names, head, seen = get_tensor_name_map(arch, model.config.num_hidden_layers), Head.of(model.config), set()
    turned = {"q_proj": head.heads, "k_proj": head.shared} if found.neighbours else {}
    for path, module in model.named_modules():
        for parameter, value in module._parameters.items():
            key = f"{path}.{parameter}"
            if value is None or (value.data_ptr(), value.shape) in seen:
                continue
            seen.add((value.data_ptr(), value.shape))
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if name is None or not _known(module, value):
                raise Refused(f"{key} of a {plain_type(module).__name__}", "llama.cpp has no place for it", "export the plain or packed model, without adapters")
            yield Place(key, name, module, parameter, turned.get(path.rpartition(".")[2], 0))


def _known(module: Any, value: Tensor) -> bool:
    return value.dim() == 1 or packed_kind(module) in (PackedLinear, PackedEmbedding)


def turn(rows: Any, heads: int) -> Any:
    """Rows of q and k as llama.cpp turns them: channel c of a head beside channel c + half, where transformers turns them half a head apart."""
    return rows if not heads else rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def frequencies(model: Any) -> Tensor | None:
    """llama3 only: by what each frequency is divided, float32 [channels / 2], as llama.cpp wants it."""
    if _rope(model.config) != "llama3":
        return None
    head = Head.of(model.config)
    plain = 1.0 / float(model.config.rope_parameters["rope_theta"]) ** (torch.arange(0, head.channels, 2, dtype=torch.float32) / head.channels)
    return plain / model.model.rotary_emb.inv_freq.float().cpu()


def _rope(config: Any) -> str:
    return str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))
