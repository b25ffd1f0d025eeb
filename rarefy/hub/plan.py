"""The plan in config.json: which layers are packed, which shapes were edited, which inputs are gated, and how to prove it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rarefy.core.attach import OUTPUT
from rarefy.core.discover import methods
from rarefy.core.errors import BadFile, BadInput
from rarefy.core.roles import Gate
from rarefy.hub.tensors import digest
from rarefy.layouts import LAYOUTS
from rarefy.surgery.narrow import Narrow

METHOD = "rarefy"
NAMED = "rarefy (pip install rarefy, then import rarefy)"  # the quant_method in the files: what does not know it prints it
VERSION = 1
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LARGEST = 2**31
_AGAIN = "write the folder again"
_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)
_SHA = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Layer:
    """One packed matrix: layout, [out, in], dtype of its values, sha256 and length of its bytes."""

    layout: str
    shape: tuple[int, int]
    dtype: str
    sha256: str
    bytes: int

    @staticmethod
    def of(weight: Tensor, packed: Tensor, layout: str) -> Layer:
        return Layer(layout, (weight.shape[0], weight.shape[1]), str(weight.dtype).removeprefix("torch."), digest(packed), packed.numel())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}

    def verify(self, packed: Tensor, name: str) -> None:
        """Raise BadFile unless length, checksum and bit count are those of the plan."""
        if packed.numel() != self.bytes:
            raise BadFile(f"packed tensor {name}", f"it has {packed.numel()} bytes where the plan says {self.bytes}", "the file is damaged; write it again")
        if digest(packed) != self.sha256:
            raise BadFile(f"packed tensor {name}", "its sha256 is not the plan's", "the file is damaged; download or write it again")
        LAYOUTS[self.layout].check(packed, self.shape, DTYPES[self.dtype], name)


@dataclass(frozen=True)
class Plan:
    """What a folder differs in from its config: {path: packed layer}, edits in order, {place: gate}, {key of a tensor in the files: its seal}."""

    layers: Mapping[str, Layer] = field(default_factory=dict)
    edits: tuple[Narrow, ...] = ()
    gates: Mapping[str, Gate] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields of `quantization_config`, `quant_method` aside."""
        body: dict[str, Any] = {
            "version": VERSION,
            "layers": {path: layer.to_dict() for path, layer in self.layers.items()},
            "edits": [edit_dict(edit) for edit in self.edits],
            "gates": {path: gate_dict(gate) for path, gate in self.gates.items()},
            "tensors": dict(self.tensors),
        }
        return {**body, "sha256": _digest_of(body)}


def edit_dict(edit: Narrow) -> dict[str, Any]:
    return {"edit": "narrow", "rows": list(edit.rows), "columns": list(edit.columns), "from": edit.width, "to": edit.kept}


def gate_dict(gate: Gate) -> dict[str, Any]:
    return {"gate": type(gate).name, "settings": gate.settings()}


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse(fields: Mapping[str, Any]) -> Plan:
    """A plan from `quantization_config`, every field checked.

    `sha256` may be absent where nothing but `version` and `layers` is given.

    Raises:
        BadFile: a field is unknown, missing, out of range or not what the plan's own checksum says.
    """
    version = fields.get("version")
    if version != VERSION or isinstance(version, bool):
        raise BadFile(f"packed format version {version!r}", f"this rarefy reads version {VERSION}", "upgrade rarefy")
    unknown = sorted(set(fields) - {"version", "layers", "edits", "gates", "tensors", "sha256"})
    if unknown:
        raise BadFile(f"the plan in config.json with {unknown[0]!r}", "it holds version, layers, edits, gates, tensors and sha256 only", "upgrade rarefy")
    shapes = {
        "layers": (Mapping, "a mapping of module paths"),
        "edits": (list, "a list"),
        "gates": (Mapping, "a mapping of module paths"),
        "tensors": (Mapping, "a mapping of keys"),
    }
    for name, (kind, words) in shapes.items():
        if not isinstance(fields.get(name, kind() if kind is list else {}), kind):
            raise BadFile("the plan in config.json", f"its {name} must be {words}", _AGAIN)
    plan = Plan(
        {path: _layer(_path(path), entry) for path, entry in fields.get("layers", {}).items()},
        tuple(_edit(entry) for entry in fields.get("edits", [])),
        {place: _gate(_place(place), entry) for place, entry in fields.get("gates", {}).items()},
        {key: _sha(_path(key), entry) for key, entry in fields.get("tensors", {}).items()},
    )
    _check_own(plan, fields)
    return plan


def _check_own(plan: Plan, fields: Mapping[str, Any]) -> None:
    bare = "sha256" not in fields
    if bare and (set(fields) - {"version", "layers"}):
        raise BadFile("the plan in config.json", "it holds no sha256 of itself", _AGAIN)
    if not bare and fields["sha256"] != _digest_of({"edits": [], "gates": {}, "tensors": {}, "layers": {}, **{k: v for k, v in fields.items() if k != "sha256"}}):
        raise BadFile("the plan in config.json", "its sha256 is not that of its own fields", "the file was damaged or edited; write it again")
    if (plan.edits or plan.gates) and not plan.tensors:
        raise BadFile("the plan in config.json", "with edits or gates it lists a sha256 of every tensor", _AGAIN)
    for place in plan.gates:
        if place.endswith(OUTPUT) and not any(beside(place, path) for path in plan.layers):
            raise BadFile(f"the gate on {place}", "beside a gated output a layer is stored packed, so that nobody runs it dense", _AGAIN)
        if not place.endswith(OUTPUT) and place not in plan.layers:
            raise BadFile(f"the gate on {place}", "a gated layer is stored packed, so that nobody runs it dense", _AGAIN)


def beside(place: str, path: str) -> bool:
    """Whether the layer at `path` has the parent of the module whose output is gated at `place`, or is that module."""
    gated = place.removesuffix(OUTPUT)
    return path == gated or path.rpartition(".")[0] == gated.rpartition(".")[0]


def _place(place: Any) -> str:
    _path(place.removesuffix(OUTPUT) if isinstance(place, str) else place)
    return str(place)


def _path(path: Any) -> str:
    if not isinstance(path, str) or _PATH.fullmatch(path) is None:
        raise BadFile(f"the name {str(path)[:80]!r} in the plan", "a name is made of letters, digits, _ and dots between", _AGAIN)
    return path


def _layer(path: str, entry: Any) -> Layer:
    if not isinstance(entry, Mapping) or set(entry) != {"layout", "shape", "dtype", "sha256", "bytes"}:
        raise BadFile(f"the plan of {path}", "it must hold exactly layout, shape, dtype, sha256 and bytes", _AGAIN)
    layout, shape, dtype, sha, count = (entry[k] for k in ("layout", "shape", "dtype", "sha256", "bytes"))
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise BadFile(f"layout {layout!r} of {path}", f"known layouts are {', '.join(LAYOUTS)}", "upgrade rarefy")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadFile(f"dtype {dtype!r} of {path}", f"known dtypes are {', '.join(DTYPES)}", _AGAIN)
    if not isinstance(shape, (list, tuple)) or len(shape) != 2 or not all(_whole(n) for n in shape):
        raise BadFile(f"shape {shape!r} of {path}", "a shape is two positive integers", _AGAIN)
    most = LAYOUTS[layout].size((shape[0], shape[1]), shape[0] * shape[1], DTYPES[dtype])
    if type(count) is not int or not 0 < count <= most:
        raise BadFile(f"bytes {count!r} of {path}", f"a packed {shape[0]} x {shape[1]} has at most {most} bytes", _AGAIN)
    return Layer(layout, (shape[0], shape[1]), dtype, _sha(path, sha), count)


def _edit(entry: Any) -> Narrow:
    if not isinstance(entry, Mapping) or entry.get("edit") != "narrow":
        raise BadFile(f"edit {(entry.get('edit') if isinstance(entry, Mapping) else entry)!r} of the plan", "the known edit is narrow", "upgrade rarefy")
    if set(entry) != {"edit", "rows", "columns", "from", "to"} or not all(isinstance(entry[k], list) and entry[k] for k in ("rows", "columns")):
        raise BadFile("a narrow edit of the plan", "it must hold exactly edit, rows, columns, from and to, rows and columns as lists of paths", _AGAIN)
    rows, columns = (tuple(_path(p) for p in entry[k]) for k in ("rows", "columns"))
    width, kept = entry["from"], entry["to"]
    if not _whole(width) or not _whole(kept) or not kept < width:
        raise BadFile(f"narrowing {', '.join(rows)} from {width!r} to {kept!r}", "widths are positive integers and the second is smaller", _AGAIN)
    return Narrow(rows, columns, width, kept)


def _gate(path: str, entry: Any) -> Gate:
    if not isinstance(entry, Mapping) or set(entry) != {"gate", "settings"} or not isinstance(entry["settings"], Mapping):
        raise BadFile(f"the gate on {path}", "it must hold exactly gate and settings", _AGAIN)
    known, name, settings = methods(Gate), entry["gate"], entry["settings"]
    if not isinstance(name, str) or name not in known:
        raise BadFile(f"gate {name!r} on {path}", f"known gates are {', '.join(known)}", "upgrade rarefy, or load the plug-in that defines it")
    kind: Any = known[name]
    if set(settings) != set(kind().settings()) or not all(type(v) in (int, float) and abs(v) < math.inf for v in settings.values()):
        raise BadFile(f"settings {dict(settings)!r} of the {name} gate on {path}", f"they are finite numbers for {', '.join(kind().settings())}", _AGAIN)
    try:
        gate: Gate = kind(**settings)
    except BadInput as error:
        raise BadFile(f"{error.value} of the gate on {path}", error.rule, _AGAIN) from error
    return gate


def _sha(path: str, sha: Any) -> str:
    if not isinstance(sha, str) or _SHA.fullmatch(sha) is None:
        raise BadFile(f"sha256 of {path}", "it must be 64 hexadecimal digits", _AGAIN)
    return sha


def _whole(n: Any) -> bool:
    return type(n) is int and 0 < n < _LARGEST
