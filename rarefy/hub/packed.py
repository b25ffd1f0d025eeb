"""Packed layers and the plan around them: the zeros are not stored, and a layer computes with its bytes as they lie."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.core.attach import OUTPUT, attach_gate, gated, plain_type, viewed
from rarefy.core.errors import BadInput, MissingExtra, Refused
from rarefy.core.roles import Matrix, Rows
from rarefy.hub.atomic import atomic_folder
from rarefy.hub.card import Card, Figure, write_card
from rarefy.hub.export import plain_config
from rarefy.hub.plan import DTYPES, Layer, Plan, beside, edit_dict, gate_dict
from rarefy.hub.tensors import INDEX, Stored, digest, read_json, stored
from rarefy.layouts import LAYOUTS, ops
from rarefy.layouts.flat import Flat
from rarefy.runtime.choose import DENSE, Chooser
from rarefy.surgery.narrow import edits, replay, widen
from rarefy.weights.sites import find_sites

RECORD = "pack.json"
_SAVE_AGAIN = "dequantize it and save it with rarefy.hub.packed.save_packed"


class Packed(nn.Module, ABC):
    """A matrix whose `weight` is uint8 [bytes]; `bias` is that of the layer it stands for."""

    bias: nn.Parameter | None

    def __init__(self, layer: Layer, packed: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.layer = layer
        self.out_features, self.in_features = layer.shape
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", bias)

    def matrix(self) -> Matrix:
        """The weight [out, in], ready to compute with; made again where the bytes were moved or written to."""
        return ops.ready(self.weight, self.layer.layout, self.layer.shape, DTYPES[self.layer.dtype])

    @abstractmethod
    def plain(self) -> nn.Module:
        """The layer that it stands for, dense."""

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, layout={self.layer.layout}"

    def dense(self) -> Tensor:
        """The weight [out, in]."""
        if torch.compiler.is_compiling():
            return ops.packed_dense(self.weight, *self._about())
        return LAYOUTS[self.layer.layout].unpack(self.weight.detach(), self.layer.shape, DTYPES[self.layer.dtype])

    def _about(self) -> tuple[str, int, int, torch.dtype]:
        """What an operator is told of the bytes."""
        return self.layer.layout, self.out_features, self.in_features, DTYPES[self.layer.dtype]


class PackedLinear(Packed):
    """A Linear.

    A few rows of x are multiplied by the packed weights in native code, where it is there: to the rounding of another order
    of summing, or as the layout rounds. More rows, gradients and other devices unpack the weight and call `torch.nn.functional.linear`.
    Compiled code does the same through one operator, without a break.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return self.matrix().linear(x, self.bias)
        if x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type) and not self._derives(x):
            return ops.packed_linear(x, self.weight, self.bias, *self._about())
        return F.linear(x, self.dense().to(x.dtype), self.bias)

    def _derives(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad))

    def plain(self) -> nn.Module:
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dense())
        linear.register_parameter("bias", self.bias)
        return linear


class PackedConv1D(Packed):
    """transformers' Conv1D, whose weight is [in, out]: each forward unpacks it and calls `torch.addmm`."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.dense().t().contiguous().to(x.dtype)
        assert self.bias is not None
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], self.out_features)

    def plain(self) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        assert self.bias is not None
        with torch.device("meta"):
            conv = Conv1D(self.out_features, self.in_features)
        conv.weight, conv.bias = nn.Parameter(self.dense().t().contiguous()), self.bias
        return conv


class PackedEmbedding(Packed):
    """An Embedding: each forward unpacks the rows that it is asked for."""

    def __init__(self, layer: Layer, packed: Tensor, bias: None = None) -> None:
        super().__init__(layer, packed, bias)

    def forward(self, ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return ops.packed_rows(ids, self.weight, *self._about())
        return self.rows().take(ids).to(DTYPES[self.layer.dtype])

    def rows(self) -> Rows:
        """The weight, of which single rows can be read."""
        return ops.rows_of(self.weight, self.layer.layout, self.layer.shape, DTYPES[self.layer.dtype])

    def plain(self) -> nn.Module:
        return nn.Embedding(self.out_features, self.in_features, _weight=self.dense())


def packed_kind(module: nn.Module) -> type[PackedLinear] | type[PackedConv1D] | type[PackedEmbedding] | None:
    """The packed class that stands for a module, or None where there is none."""
    kind = plain_type(module)
    if kind is nn.Linear:
        return PackedLinear
    if kind is nn.Embedding:
        return PackedEmbedding
    return PackedConv1D if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" else None


def matrix(module: Any) -> Tensor:
    """The weight of a Linear, Conv1D or Embedding as [out, in]."""
    weight: Tensor = module.weight.detach()
    return weight.t() if packed_kind(module) is PackedConv1D else weight


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def save_packed(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    layout: str | Chooser = "bitmask",
    *,
    embeddings: str | None = None,
    force: bool = False,
    max_shard_size: str | int = "50GB",
    gating: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Save a transformers model with its sparse layers packed, its gates and its edits; the model itself is left as it was.

    A Linear or Conv1D is packed where that is smaller than the dense tensor. A gated one is packed in any case, `flat`
    where `layout` takes more, so that transformers without rarefy cannot run it dense. The others stay dense, fused
    experts among them, and the record says why. With a `Chooser` in place of a layout's name, each matrix is stored in the lossless layout that is
    fastest on this machine, and stays dense where the dense product is.
    `embeddings` is a layout, int8 say, for the embedding and the output head, which are left as they are without it.
    `gating` is what `rarefy.activations.apply.apply_gating` measured, to be kept in the record.

    Returns:
        The record: layout, bytes before and after, gates, edits, and per site its density, layout, bytes, relative error and the reason where it stays dense.

    Raises:
        BadInput: unknown layout, or a model that is already quantised.
        Refused: the plan does not rebuild the live model; a view is attached; as `rarefy.hub.atomic.check_target`.
    """
    if isinstance(layout, str) and layout not in LAYOUTS:
        raise BadInput(f"layout {layout!r}", f"known layouts are {', '.join(LAYOUTS)}", "pass one of them")
    try:
        from rarefy.hub.quantizer import RarefyConfig
    except ModuleNotFoundError as error:
        raise MissingExtra("transformers", "hub") from error
    plain_config(model)
    if getattr(model.config, "quantization_config", None) is not None:
        raise BadInput("a quantised model", "only plain weights can be packed", "dequantize it first")
    for key in viewed(model):
        raise Refused(f"the view on {key}", "a folder holds plain weights", "save inside `with exported(model)`")
    if embeddings is not None and embeddings not in LAYOUTS:
        raise BadInput(f"layout {embeddings!r} for the embeddings", f"known layouts are {', '.join(LAYOUTS)}", "pass one of them, for example int8")
    gates, layers, packed, sites = gated(model), {}, {}, []
    for path, module in _matrices(model):
        must = path in gates or any(place.endswith(OUTPUT) and beside(place, path) for place in gates)
        layer, data, site = _pack(path, module, layout, must, _shared(model, module))
        sites.append(site)
        if layer is not None:
            layers[path], packed[f"{path}.weight"] = layer, data
    for path, layer, data, site in _ends(model, embeddings):
        sites.append(site)
        layers[path], packed[f"{path}.weight"] = layer, data
    sites += _unpackable(model)
    for place in gates:
        if place.endswith(OUTPUT) and not any(beside(place, path) for path in layers):
            raise Refused(f"the gate on {place}", "no Linear or Conv1D lies beside it that would keep others from running it dense", "detach the gate")
    plan = Plan(layers, edits(model), gates)
    rebuilds(model, plan)
    record = {
        "layout": layout if isinstance(layout, str) else "auto",
        "bytes_dense": sum(s["bytes_dense"] for s in sites),
        "bytes_stored": sum(s["bytes"] for s in sites),
        "packed": len(layers),
        "gates": [{"name": path, **gate_dict(gate)} for path, gate in gates.items()],
        "edits": [edit_dict(edit) for edit in plan.edits],
        "sites": sites,
        **({} if gating is None else {"gating": dict(gating)}),
    }
    try:
        with atomic_folder(Path(out), force=force) as draft:
            _write(model, draft, packed, max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(draft)
            if layers or plan.edits:
                seals = {key: tensor.seal() for key, tensor in stored(draft.glob("*.safetensors")).items()}
                model.config.quantization_config = RarefyConfig(**Plan(layers, plan.edits, gates, seals).to_dict())
                model.config.save_pretrained(draft)
            write_card(draft, model, _card(record))
            (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    finally:
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return record


def _card(record: Mapping[str, Any]) -> Card:
    if not record["packed"] and not record["edits"]:
        return Card("packed", ("No matrix is smaller packed: the weights are stored as they were.",), (), RECORD)
    holds = [f"{record['packed']} of {len(record['sites'])} matrices are stored packed, layout `{record['layout']}`"]
    holds += [f"{len(record[what])} {words}" for what, words in (("gates", "activation gates"), ("edits", "narrower MLPs")) if record[what]]
    return Card("packed", (", ".join(holds) + ".",), tuple(_figures(record)), RECORD, packed=True)


def _figures(record: Mapping[str, Any]) -> Iterator[Figure]:
    stored, dense = record["bytes_stored"], record["bytes_dense"]
    yield Figure("bytes of the matrices", f"{stored:,}", f"stored, of {dense:,} dense" + (f" ({stored / dense:.1%})" if dense else ""))
    lossy = [site["error"] for site in record["sites"] if site["error"]]
    if lossy:
        yield Figure(
            "relative error of the weights", f"{sum(lossy) / len(lossy):.4f}", f"mean over the {len(lossy)} matrices that lost bits, of the norm of the difference to the norm"
        )
    if "gating" in record:
        ledger = record["gating"]["ledger"]
        yield Figure("activations that stay", f"{record['gating']['density']:.2%}", f"of the gated ones, on {ledger['tokens']} held-out tokens ({record['gating']['gating']})")
        yield Figure("multiply-adds of the matrices", f"{ledger['mac_density']:.2%}", "of the dense model's, counted on the same tokens")


def _write(model: Any, draft: Path, packed: dict[str, Tensor], max_shard_size: str | int) -> None:
    """Files as transformers writes them when the reloaded model is saved again: keys sorted, packed bytes counted as parameters."""
    state = model.state_dict()
    try:
        type(model).save_pretrained(model, draft, state_dict=dict(sorted({**state, **packed}.items())), max_shard_size=max_shard_size)
    except RuntimeError as error:
        if "shared tensors" not in str(error):
            raise
        raise Refused("two names of one tensor", "the model does not declare that they are tied, so they would not be tied again", "clone one of them") from error
    index = draft / INDEX
    if index.is_file():
        content = read_json(index.read_bytes(), INDEX)
        own = {state[key].data_ptr(): data.numel() - state[key].numel() for key, data in packed.items()}  # a tied tensor once
        content["metadata"]["total_parameters"] += sum(own.values())
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _matrices(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The sites that can be packed, and every gated module besides."""
    paths = [site.module for site in find_sites(model)]
    inputs = [place for place in gated(model) if not place.endswith(OUTPUT)]
    for path in dict.fromkeys([*paths, *inputs]):
        module = model.get_submodule(path)
        if packed_kind(module) in (PackedLinear, PackedConv1D):
            yield path, module
        elif path in inputs:
            raise Refused(f"the gate on {path}", f"a plan can gate the input of a Linear or a Conv1D, not of a {plain_type(module).__name__}", "detach the gate")


def _ends(model: Any, layout: str | None) -> Iterator[tuple[str, Layer, Tensor, dict[str, Any]]]:
    """The embedding and the output head, packed; where they are tied, as one tensor under two names."""
    if layout is None:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {module: path for path, module in model.named_modules()}
    if packed_kind(embedding) is not PackedEmbedding or not (head is None or packed_kind(head) is PackedLinear):
        kinds = ", ".join(plain_type(module).__name__ for module in (embedding, head) if module is not None)
        raise Refused(f"embeddings in {layout}", f"an Embedding and a Linear can be packed, and here are {kinds}", "leave the embeddings as they are")
    found: dict[int, tuple[Layer, Tensor]] = {}
    for module in (embedding, head):
        if module is None:
            continue
        weight = matrix(module)
        key, before = weight.data_ptr(), weight.numel() * weight.element_size()
        tied = key in found
        if not tied:
            packed = LAYOUTS[layout].pack(weight)
            found[key] = Layer.of(weight, packed, layout), packed
        layer, packed = found[key]
        if module is embedding and not isinstance(LAYOUTS[layout].matrix(packed, layer.shape, weight.dtype), Rows):
            raise BadInput(f"layout {layout} for the embeddings", "single rows cannot be read from it", "pass int8, int4 or flat")
        site = {"name": f"{paths[module]}.weight", "density": int(torch.count_nonzero(weight)) / weight.numel(), "dense_because": None, "layout": layout}
        yield paths[module], layer, packed, {**site, "bytes_dense": 0 if tied else before, "bytes": 0 if tied else packed.numel(), "error": _error(weight, layer, packed)}


def _unpackable(model: nn.Module) -> list[dict[str, Any]]:
    """What `prune` may have made sparse and no packed layer stands for, so that a record keeps silent about nothing: a row a tensor."""
    found: dict[str, Any] = {}
    for site in find_sites(model):
        module = model.get_submodule(site.module)
        if packed_kind(module) is None:
            weight = model.get_parameter(site.key).detach()
            fused = f"the {weight.shape[0]} experts of a fused tensor" if site.expert is not None else f"the weight of a {plain_type(module).__name__}"
            size = weight.numel() * weight.element_size()
            reason = f"{fused} cannot be packed yet, only Linear and Conv1D"
            density = int(torch.count_nonzero(weight)) / weight.numel()
            found[site.key] = {"name": site.key, "density": density, "bytes_dense": size, "dense_because": reason, "layout": None, "bytes": size, "error": 0.0}
    return list(found.values())


def _shared(model: nn.Module, module: Any) -> bool:
    return sum(p is module.weight for m in model.modules() for p in m._parameters.values()) > 1


def _pack(path: str, module: Any, chosen: str | Chooser, must: bool, shared: bool) -> tuple[Layer | None, Tensor, dict[str, Any]]:
    weight = matrix(module)
    before = weight.numel() * weight.element_size()
    layout, because = (chosen, None) if isinstance(chosen, str) else _fastest(chosen, weight)
    packed = LAYOUTS[layout].pack(weight)
    reason = "its tensor is shared" if shared else because or ("packed it would be no smaller" if packed.numel() >= before else None)
    if must and shared:
        raise Refused(f"the gate on {path}", "its tensor is shared, so that it cannot be stored packed, and plain transformers would run it dense", "untie it or detach the gate")
    if must and reason is not None:
        reason = None
        if packed.numel() > LAYOUTS[Flat.name].size((weight.shape[0], weight.shape[1]), weight.numel(), weight.dtype):
            layout, packed = Flat.name, LAYOUTS[Flat.name].pack(weight)
    site = {"name": f"{path}.weight", "density": int(torch.count_nonzero(weight)) / weight.numel(), "bytes_dense": before, "dense_because": reason}
    if reason is not None:
        return None, packed, {**site, "layout": None, "bytes": before, "error": 0.0}
    layer = Layer.of(weight, packed, layout)
    return layer, packed, {**site, "layout": layout, "bytes": packed.numel(), "error": _error(weight, layer, packed)}


def _fastest(chooser: Chooser, weight: Tensor) -> tuple[str, str | None]:
    """A layout, and why the matrix stays dense or None."""
    choice = chooser(weight.contiguous())
    return (Flat.name, choice.because) if choice.layout == DENSE else (choice.layout, None)


def _error(weight: Tensor, layer: Layer, packed: Tensor) -> float:
    """``||W' - W|| / ||W||`` of what comes back; 0 for a lossless layout."""
    if LAYOUTS[layer.layout].lossless or not bool(weight.any()):
        return 0.0
    back = LAYOUTS[layer.layout].unpack(packed, layer.shape, torch.float32)
    return float((back - weight.float()).norm() / weight.float().norm())


def rebuilds(model: Any, plan: Plan) -> None:
    """Raise Refused unless a model built from the config, with the plan's edits, has the keys and shapes of the live one."""
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(model.config))
    for edit in plan.edits:
        replay(built, edit)
    for path, gate in plan.gates.items():
        attach_gate(built, path, copy.deepcopy(gate))
    live, new = ({key: tuple(value.shape) for key, value in m.state_dict().items()} for m in (model, built))
    for key in sorted({*live, *new}):
        if live.get(key) != new.get(key):
            raise Refused(f"{key} of shape {live.get(key)}", f"config and plan build {new.get(key)} there", "edit shapes with rarefy.surgery.narrow only, and save no adapters")


def unchanged(model: Any, plan: Plan) -> None:
    """Raise Refused unless a loaded model is still what its plan says: layers, gates, edits and every other tensor."""
    from transformers.core_model_loading import revert_weight_conversion

    modules = dict(model.named_modules())
    for path, layer in plan.layers.items():
        module = modules.get(path)
        if not isinstance(module, Packed) or module.layer != layer or digest(module.weight) != layer.sha256:
            raise Refused(f"layer {path}", "it is not the packed layer of the plan any more", _SAVE_AGAIN)
    live = {path: gate_dict(gate) for path, gate in gated(model).items()}
    for path in sorted({*live, *plan.gates}):
        if path not in live or path not in plan.gates or live[path] != gate_dict(plan.gates[path]):
            raise Refused(f"the gate on {path}", "the plan has another one or none", "put the gates of the plan back, or " + _SAVE_AGAIN)
    if edits(model) != plan.edits:
        raise Refused("the edits of the model", "the plan has others", _SAVE_AGAIN)
    if not plan.tensors:
        return
    state = revert_weight_conversion(model, model.state_dict())  # as the files name them
    for key, seal in plan.tensors.items():
        if key not in state or Stored.of(state[key]).seal() != seal:
            raise Refused(f"tensor {key}", "it is not what the plan's sha256 says, in value or dtype", _SAVE_AGAIN)
    owned = {state[key].data_ptr() for key in plan.tensors}
    for key in sorted(set(state) - set(plan.tensors)):
        if state[key].data_ptr() not in owned:
            raise Refused(f"tensor {key}", "the plan does not know it", _SAVE_AGAIN)


def dequantize(model: Any) -> Any:
    """Replace every packed layer by a plain one and widen narrowed MLPs with zeros, in place; afterwards the model saves as plain dense weights.

    Raises:
        Refused: the model has gates, which plain weights cannot express; `rarefy.core.attach.detach_gates` takes them off.
    """
    for path in gated(model):
        raise Refused(f"the gate on {path}", "plain weights cannot express it, and would run dense", "take it off first with rarefy.core.attach.detach_gates")
    for path, module in list(model.named_modules()):
        if isinstance(module, Packed):
            replace(model, path, module.plain().train(module.training))
    model.tie_weights()
    widen(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model
