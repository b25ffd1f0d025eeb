"""`rarefy unpack`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer

from rarefy.cli.arguments import Device, Force, Json, Out
from rarefy.cli.loading import check_out, load
from rarefy.cli.main import app
from rarefy.cli.output import line, megabytes, show
from rarefy.core.attach import detach_gates, gated
from rarefy.core.errors import Refused
from rarefy.hub.card import Card
from rarefy.hub.export import save_dense
from rarefy.hub.packed import Packed, dequantize
from rarefy.hub.plan import edit_dict, gate_dict
from rarefy.surgery.narrow import edits

RECORD = "unpack.json"


@app.command(epilog="Examples:  rarefy unpack half-packed --out half   ·   rarefy unpack gated --drop-gates --out half --json")
def unpack(
    model: Annotated[str, typer.Argument(help="A packed folder, or a Hugging Face name.")],
    out: Out,
    drop_gates: Annotated[bool, typer.Option("--drop-gates", help="Leave activation gates out, which a plain folder cannot hold: the model then computes something else.")] = False,
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """A packed folder made dense again, every zero in place: plain transformers loads it, and it can be pruned and healed."""
    check_out(out, model, force=force)
    loaded = load(model, device=device)
    sites: list[dict[str, Any]] = [
        {"name": f"{path}.weight", "layout": module.layer.layout, "shape": list(module.layer.shape), "bytes": module.layer.bytes}
        for path, module in loaded.model.named_modules()
        if isinstance(module, Packed)
    ]
    if not sites:
        raise Refused(f"{model} is not packed", "its weights are plain already", "use it as it is")
    gates, widened = gated(loaded.model), edits(loaded.model)
    if gates and not drop_gates:
        raise Refused(
            f"the gate on {next(iter(gates))}" + (f" and {len(gates) - 1} more" if len(gates) > 1 else ""),
            "a plain folder cannot hold it, and transformers would run the model without",
            "use the packed folder as it is, or pass --drop-gates to leave gates out",
        )
    detach_gates(loaded.model)
    dequantize(loaded.model)
    sites = [{**site, **_plain(loaded.model.get_parameter(site["name"]))} for site in sites]
    record = {
        "model": model,
        "bytes_stored": sum(s["bytes"] for s in sites),
        "bytes_dense": sum(s["bytes_dense"] for s in sites),
        "sites": sites,
        "dropped_gates": [{"name": place, **gate_dict(gate)} for place, gate in gates.items()],
        "widened": [edit_dict(edit) for edit in widened],
    }
    extra = {RECORD: lambda path: path.write_text(json.dumps(record, indent=1) + "\n")}
    save_dense(loaded.model, loaded.tokenizer, out, force=force, card=_card(record), extra=extra)
    show({**record, "out": out}, as_json, _draw)


def _plain(weight: torch.Tensor) -> dict[str, Any]:
    return {"density": int(torch.count_nonzero(weight)) / weight.numel(), "bytes_dense": weight.numel() * weight.element_size()}


def _card(r: dict[str, Any]) -> Card:
    gates = f" {len(r['dropped_gates'])} activation gates were left out." if r["dropped_gates"] else ""
    return Card("unpacked", (f"{len(r['sites'])} packed matrices were made dense again, every zero in place.{gates}",), (), RECORD)


def _draw(r: dict[str, Any]) -> None:
    zeros = 1 - sum(s["density"] * s["bytes_dense"] for s in r["sites"]) / r["bytes_dense"]
    line(f"{len(r['sites'])} matrices unpacked: {megabytes(r['bytes_stored'])} became {megabytes(r['bytes_dense'])}, {zeros:.2%} zeros; written to {r['out']}")
    for gate in r["dropped_gates"]:
        line(f"gate {gate['gate']} on {gate['name']} was left out")
