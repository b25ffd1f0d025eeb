"""Put a gating on a model, and measure what it spares on tokens that it was not calibrated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rarefy.activations.ledger import measure
from rarefy.activations.rows import collect_rows
from rarefy.activations.watch import is_matrix, matrix_shape, mlps
from rarefy.core.attach import OUTPUT, attach_gate, gated
from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Gating
from rarefy.core.roles import Gate, asks


def apply_gating(model: nn.Module, gating: Gating, batches: Sequence[Any], heldout: Sequence[Any]) -> dict[str, Any]:
    """Gate `model` in place as a gating says, calibrated on `batches`, and measure it on `heldout`.

    Args:
        model: without gates; a transformers model or any module whose forward takes a batch.
        gating: places, gates and the density shared over them.
        batches: calibration batches; `attention_mask` marks the tokens that are not padding.
        heldout: batches that the gates have not seen, on which every density is measured.

    Returns:
        {gating, density_requested, density: of all gated entries, each weighted by the multiply-adds behind it, gates: [name, gate, density_set, density],
        ledger: `rarefy.activations.ledger.Ledger.record`}; every density but the first two is measured on `heldout`.

    Raises:
        BadInput: no batches, or the model has no place of that kind.
        Refused: the model has gates.

    >>> import dataclasses, torch
    >>> from rarefy.activations.gatings.lazy_neuron import LAZY_NEURON
    >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = apply_gating(model, dataclasses.replace(LAZY_NEURON, density=0.25), [torch.randn(9, 2)], [torch.randn(9, 2)])
    >>> found["gates"][0]["name"], found["density"] <= 0.25
    ('1:output', True)
    """
    if gated(model):
        raise Refused("a model with gates", "a gating is found from the dense model", "detach the gates first")
    if not batches or not heldout:
        raise BadInput(f"{len(batches)} calibration and {len(heldout)} held-out batches", "a gating is calibrated on some tokens and measured on others", "pass both")
    gates = {place: kind for places, kind in gating.parts for place in places.find(model, batches[0])}
    if not gates:
        raise BadInput(f"gating {gating.name!r}", "the model shows none of its places", f"it looks for {', '.join(type(p).name for p, _ in gating.parts)}")
    sizes, partners = _sizes(model, list(gates), batches[0]), _partners(model, batches[0])
    shares = gating.sharing.densities(model, sizes, gating.density, batches)
    made = {place: gates[place](share) for place, share in shares.items()}
    beside = {place: partners[place] + OUTPUT for place in made if place in partners}
    rows = collect_rows(model, list(dict.fromkeys([*made, *beside.values()])), batches)
    for place, gate in made.items():
        _calibrate(gate, rows[place], rows.get(beside.get(place, "")))
        attach_gate(model, place, gate.to(rows[place].device))
    return {"gating": gating.name, "density_requested": gating.density, **_measured(model, shares, sizes, heldout)}


def measure_gates(model: nn.Module, gate: Gate, heldout: Sequence[Any]) -> dict[str, Any]:
    """What the gates of `model` spare on `heldout`, as `apply_gating` says it of its own; `gate` is what they were copied from.

    Returns:
        {density_requested: the gate's, None where it has none, density, gates, ledger}.

    >>> import torch
    >>> from rarefy.activations.gates.topk import TopK
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> attach_gate(model, "0", TopK(0.25))
    >>> found = measure_gates(model, TopK(0.25), [torch.randn(9, 4)])
    >>> found["density"], found["gates"][0]["density"]
    (0.25, 0.25)
    """
    asked = gate.settings().get("density")
    asked = asked if asked is not None and asked < 1 else None  # a threshold that was given as one asks for no density
    shares = dict.fromkeys(gated(model), asked)
    return {"density_requested": asked, **_measured(model, shares, _sizes(model, list(shares), heldout[0]), heldout)}


def _calibrate(gate: Gate, rows: Tensor, partner: Tensor | None) -> None:
    gate.calibrate(rows, **({"partner": partner} if "partner" in asks(gate.calibrate) else {}))


def _measured(model: nn.Module, shares: Mapping[str, float | None], sizes: dict[str, int], heldout: Sequence[Any]) -> dict[str, Any]:
    ledger = measure(model, heldout)
    found = gated(model)
    rows = [{"name": place, "gate": type(found[place]).name, "density_set": share, "density": ledger.density(place)} for place, share in shares.items()]
    density = sum(sizes[place] * ledger.density(place) for place in shares) / sum(sizes.values())
    return {"density": density, "gates": rows, "ledger": ledger.record()}


def _sizes(model: nn.Module, places: Sequence[str], batch: Any) -> dict[str, int]:
    """Multiply-adds a token behind each place: of the matrix that reads it, and of the partner whose outputs it spares."""
    units = {m.act + OUTPUT: [p for p in (m.partner, m.reads) if p is not None] for m in mlps(model, batch)} if any(p.endswith(OUTPUT) for p in places) else {}

    def size(path: str) -> int:
        outputs, inputs = matrix_shape(model.get_submodule(path))
        return outputs * inputs

    return {place: sum(size(path) for path in units.get(place, [place])) for place in places if place in units or is_matrix(model.get_submodule(place))}


def _partners(model: nn.Module, batch: Any) -> dict[str, str]:
    return {m.act + OUTPUT: m.partner for m in mlps(model, batch) if m.partner is not None}
