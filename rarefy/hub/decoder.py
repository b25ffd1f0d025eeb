"""A Llama-family model of transformers whose decoding runs in native code, under transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from rarefy.core.attach import OUTPUT, gated, plain_type
from rarefy.core.discover import pick
from rarefy.core.errors import BadInput, Refused
from rarefy.core.roles import Rows
from rarefy.hub.columns import store_columns
from rarefy.hub.llama_fields import FIELDS
from rarefy.hub.packed import PackedEmbedding, PackedLinear
from rarefy.hub.plan import DTYPES
from rarefy.kernels.columns import ColumnsMatrix
from rarefy.kernels.dense import DenseMatrix
from rarefy.kernels.library import native
from rarefy.layouts import LAYOUTS
from rarefy.runtime.decoder import Block, Decoder, KeyValues, Sizes
from rarefy.runtime.sieves import sieve

FAMILIES: dict[str, str] = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}

PLACES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
UNITS = f"mlp.act_fn{OUTPUT}"


HALVES = (torch.bfloat16, torch.float16)
UNREAD = "bitmask"  # what a matrix is stored in again for decoding, where its own layout has no product in the decoder


class Float32:
    """The tensors and packed layers of a model as float32: as they lie where they are, copied once where they are bfloat16, float16 or in a layout without a product."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.Size], Tensor] = {}
        self.bytes = 0  # of the copies

    def tensor(self, given: Tensor) -> Tensor:
        if given.dtype not in HALVES:
            return given.detach()
        key = (given.data_ptr(), given.shape)  # a tied head is one tensor
        if key not in self._made:
            self._made[key] = given.detach().float()
            self.bytes += 4 * given.numel()
        return self._made[key]

    def packed(self, module: PackedLinear) -> Any:
        layout = LAYOUTS[module.layer.layout]
        extension = native()
        known = extension is None or hasattr(extension.Decoder, module.matrix().kind)  # type: ignore[attr-defined]
        if known and (not layout.lossless or DTYPES[module.layer.dtype] not in HALVES):  # a lossy layout computes in float32 whatever it stands for
            return module.matrix()
        layout = layout if known else LAYOUTS[UNREAD]
        again = layout.pack(module.dense().float())
        self.bytes += again.numel()
        return layout.matrix(again, (module.out_features, module.in_features), torch.float32)


class DecoderCache(Cache):
    """The cache that transformers carries from one call to the next."""

    def __init__(self, store: KeyValues, length: int = 0) -> None:
        self.store, self.seen = store, length
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.store.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.store.select(torch.arange(len(self.store.length)).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        raise Refused("assisted generation", "the decoder's cache does not take tokens back", "generate without an assistant model")


def use_decoder(model: PreTrainedModel, head: str | None = None) -> PreTrainedModel:
    """Let the model's cached forwards, and so `generate`, run in native code, in place.

    Calls without a cache (scoring, training) run through transformers as before. Sampling, stopping, streaming, beams and
    batches of prompts are transformers' own. The weights are read where they lie: changing them in place changes the results,
    replacing them does not. Weights in bfloat16 or float16 are copied to float32, twice their bytes besides them, and changing
    them changes nothing; the logits are float32 then.

    Gates on what a layer's linears read and on its MLP's units are computed, and what they make zero is not read: matrices behind
    them are stored by columns from here on (`rarefy.hub.columns.store_columns`), in place, in as many bytes as before. A unit that
    a gate closes counts as zero whatever ``up x`` is there, NaN and inf too.

    Args:
        head: a layout (int8, say) that the output head is stored in for decoding; None keeps it as it is. A head that is tied to
            the embedding stays float32 on disk, and is what a small model spends most of its decoding on.

    Returns:
        The model; `model.rarefy_decoder` is the `Decoder`, `model.rarefy_copied_bytes` what float32 copies take.

    Raises:
        BadInput: an architecture, config field, layer or gate outside what the native code computes; it is named.
        Refused: without native kernels.
    """
    weights = Float32()
    decoder = build(model, head, weights)
    model.__dict__["rarefy_copied_bytes"] = weights.bytes
    model.__dict__["rarefy_decoder"] = decoder
    model.__dict__["forward"] = _forward(decoder, model.forward)
    return model


def _forward(decoder: Decoder, through_transformers: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> Any:
        unusual = [name for name in ("inputs_embeds", "labels", "output_attentions", "output_hidden_states") if kwargs.get(name) is not None and kwargs[name] is not False]
        ours = isinstance(past_key_values, DecoderCache)
        if ours and unusual:
            raise Refused(f"{unusual[0]} with a decoder cache", "the native decoder gives logits only", "call the model without past_key_values")
        fresh = past_key_values is None or past_key_values.get_seq_length() == 0
        if not ours and (unusual or not use_cache or not fresh or input_ids is None):
            return through_transformers(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs
            )
        assert input_ids is not None
        cache = past_key_values if ours else DecoderCache(decoder.cache(input_ids.shape[0]))
        valid = None if attention_mask is None else _last(attention_mask, input_ids.shape[1])
        with torch.no_grad():
            logits = decoder.step(input_ids, cache.store, valid, logits_to_keep)
        cache.seen += input_ids.shape[1]
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    return forward


def _last(mask: Tensor, columns: int) -> Tensor:
    if mask.dim() != 2:
        raise Refused(f"an attention mask of {mask.dim()} dimensions", "the decoder reads a padding mask [sequences, tokens]")
    return mask[:, -columns:]


def build(model: Any, head: str | None = None, weights: Float32 | None = None) -> Decoder:
    """The `Decoder` of a model; see `use_decoder`."""
    config = model.config
    _whitelisted(model, config)
    _known_gates(model)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = Sizes(
        config.hidden_size, config.intermediate_size, heads, kv_heads, head_dim, config.vocab_size, config.num_hidden_layers, config.max_position_embeddings, config.rms_norm_eps
    )
    inside, weights = model.model, weights or Float32()
    cos, sin = inside.rotary_emb(torch.zeros(1), torch.arange(sizes.positions)[None])
    half = head_dim // 2
    behind = [module for layer in inside.layers for module in _behind_gates(layer)]

    def made(weights: Float32) -> Decoder:
        blocks = [_block(layer, f"model.layers.{number}", weights) for number, layer in enumerate(inside.layers)]
        tables = (cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous())
        return Decoder(sizes, blocks, _embedding(inside.embed_tokens, weights), weights.tensor(inside.norm.weight), _head(model.lm_head, head, weights), *tables)

    if behind:
        made(Float32())  # what is refused is refused before a matrix is turned
    for module in behind:
        store_columns(module)
    return made(weights)


def _whitelisted(model: Any, config: Any) -> None:
    kind = type(model).__name__
    if kind not in FAMILIES:
        raise BadInput(f"a {kind}", f"the native decoder knows {', '.join(FAMILIES)}", "run it through transformers")
    for name, allowed in FIELDS.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise BadInput(f"{name}={value!r} of the config", f"the native decoder computes {name}={allowed[0]!r}", "run it through transformers")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ("default", "llama3", "linear"):  # fixed frequencies: read from the model's own table
        raise BadInput(f"rope_type={rope!r} of the config", "the native decoder computes default, linear and llama3", "run it through transformers")


def _known_gates(model: Any) -> None:
    here = {f"model.layers.{number}.{path}" for number in range(len(model.model.layers)) for path in (*PLACES.values(), UNITS)}
    for place in gated(model):
        if place not in here:
            raise BadInput(f"the gate on {place}", "the native decoder computes gates on what a layer's linears read, and on its MLP's units", "run it through transformers")


def _behind_gates(layer: Any) -> list[Any]:
    """The linears of a layer that read exact zeros."""
    modules = [layer.get_submodule(place) for place in PLACES.values()]
    units = "rarefy_output" in layer.mlp.act_fn._modules
    return [module for module in modules if "rarefy_input" in module._modules or (units and module is layer.mlp.down_proj)]


def _block(layer: Any, path: str, weights: Float32) -> Block:
    modules = {name: layer.get_submodule(place) for name, place in PLACES.items()}
    gates = {name: module._modules.get("rarefy_input") for name, module in modules.items()}
    gates["units"] = layer.mlp.act_fn._modules.get("rarefy_output")
    widths = {name: module.in_features for name, module in modules.items()} | {"units": modules["down"].in_features}
    sieves = {name: sieve(gate, widths[name], f"{path} {name}") for name, gate in gates.items() if gate is not None}
    linears = {name: _matrix(module, f"{path} {name}", weights) for name, module in modules.items()}
    return Block(linears, weights.tensor(layer.input_layernorm.weight), weights.tensor(layer.post_attention_layernorm.weight), sieves)


def _embedding(module: Any, weights: Float32) -> Rows:
    if module._forward_hooks or module._forward_pre_hooks:
        raise BadInput("the embedding has forward hooks", "the native decoder would not run them", "remove them, or run the model through transformers")
    if isinstance(module, PackedEmbedding):
        return module.rows()
    return DenseMatrix(weights.tensor(module.weight))


def _head(module: Any, layout: str | None, weights: Float32) -> Any:
    if layout is None:
        return _matrix(module, "lm_head", weights)[0]
    chosen, weight = pick(LAYOUTS, layout, "layout"), weights.tensor(module.weight)
    return chosen.matrix(chosen.pack(weight), (weight.shape[0], weight.shape[1]), weight.dtype)


def _plain(module: Any, where: str) -> None:
    if module._forward_hooks or module._forward_pre_hooks:
        raise BadInput(f"{where} has forward hooks", "the native decoder would not run them", "remove them, or run the model through transformers")
    if module.__dict__.get("_rarefy_held"):
        raise BadInput(f"{where} has a view", "the native decoder would not run it", "run the model through transformers")


def _matrix(module: Any, where: str, weights: Float32) -> tuple[Any, Tensor | None]:
    _plain(module, where)
    held: Any = module.bias
    bias = None if held is None else weights.tensor(held)
    kind = plain_type(module)
    if kind is nn.Linear:
        weight = weights.tensor(module.weight)
        return DenseMatrix(weight) if weight.is_contiguous() else ColumnsMatrix(weight.t()), bias
    if kind is not PackedLinear:
        raise BadInput(f"{where} is a {kind.__name__}", "the native decoder computes plain and packed linear layers", "run it through transformers")
    return weights.packed(module), bias
