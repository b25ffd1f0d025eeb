"""`rarefy pack`."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from rarefy.activations.apply import apply_gating, measure_gates
from rarefy.activations.attach import attach_gates
from rarefy.cli import names
from rarefy.cli.arguments import Calibration, CalibrationTokens, Device, Force, Json, Model, Out, Seed
from rarefy.cli.kernels import say_absent
from rarefy.cli.loading import check_out, load, need_plain, window
from rarefy.cli.main import app
from rarefy.cli.output import line, megabytes, show, table, text
from rarefy.cli.prune import kin, need_tokenizer
from rarefy.core.errors import BadInput
from rarefy.core.roles import Gate
from rarefy.hub.cache import cache_dir
from rarefy.hub.packed import save_packed
from rarefy.hub.text import calibration_batches
from rarefy.runtime.choose import Chooser

EPILOG = (
    "Examples:  rarefy pack half --out half-packed   ·   rarefy pack half --gates teal:density=0.5 --out gated   ·   "
    "rarefy pack half --gate threshold:density=0.5 --gate-at '*.mlp.down_proj' --out gated"
)
HELDOUT = 4  # one calibration window of so many is kept back, to measure a gating on


@app.command(epilog=EPILOG)
def pack(
    model: Model,
    out: Out,
    layout: Annotated[
        str, typer.Option(help="How the sparse matrices are stored: bitmask, int8, int4, int4-asymmetric, n_m, n_m_g, …; auto times the lossless ones on this machine.")
    ] = "bitmask",
    embeddings: Annotated[str | None, typer.Option(help="A layout for the embedding and the output head too, e.g. int8; default: as they are.")] = None,
    batch: Annotated[str, typer.Option(help="With --layout auto: rows of x to be fast at, e.g. 1,64.")] = "1",
    gate: Annotated[str | None, typer.Option(help="Zero small activations in every forward: topk:density=0.5 or threshold:density=0.5.")] = None,
    gate_at: Annotated[list[str] | None, typer.Option(help="Gate the inputs of the modules that match this glob; may be repeated.")] = None,
    gates: Annotated[str | None, typer.Option(help="A published way to gate the whole model: teal:density=0.5, cats, chess, q-sparse or lazy-neuron.")] = None,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 8192,
    seed: Seed = 0,
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Store a pruned model without its zeros, gates included; `import rarefy` and from_pretrained load it again."""
    check_out(out, model, force=force)
    if (gate is None) != (not gate_at):
        raise BadInput("--gate and --gate-at", "one says which gate, the other where", "pass both, for example --gate topk:density=0.5 --gate-at '*.mlp.down_proj'")
    if gate is not None and gates is not None:
        raise BadInput("--gate and --gates", "a model is gated in one way", "pass one of them")
    chosen, whole = None if gate is None else names.part(Gate, gate), None if gates is None else names.gating(gates)
    loaded = load(model, device=device)
    need_plain(loaded)
    batches = [] if gate is gates is None else calibration_batches(need_tokenizer(loaded), calibration_tokens, window(loaded), seed, calibration)
    measured = None
    if chosen is not None:
        calibration_windows, heldout = split(batches)
        attach_gates(loaded.model, chosen, gate_at or (), calibration_windows)
        measured = {"gating": f"{gate} at {', '.join(gate_at or ())}", **measure_gates(loaded.model, chosen, heldout)}
    elif whole is not None:
        measured = apply_gating(loaded.model, whole, *split(batches))
    kept = {} if measured is None else {row["name"]: row["density"] for row in measured["gates"]}
    if layout == "auto":
        say_absent()
    chosen_layout = Chooser(_batches(batch), cache_dir() / "layouts.json") if layout == "auto" else layout
    record = save_packed(loaded.model, loaded.tokenizer, out, chosen_layout, embeddings=embeddings, force=force, gating=measured)
    shown = [{**entry, "density": kept.get(entry["name"])} for entry in record["gates"]]
    show({**record, "gates": shown, "model": model, "out": out}, as_json, _draw)


def split(batches: list[Any]) -> tuple[list[Any], list[Any]]:
    """Three windows of four to calibrate gates on, and the others, which they have not seen, to measure them on; a single window is halved.

    >>> import torch
    >>> split([1, 2, 3, 4, 5]), split([{"ids": torch.arange(4)[None]}])
    (([1, 2, 3, 5], [4]), ([{'ids': tensor([[0, 1]])}], [{'ids': tensor([[2, 3]])}]))
    """
    if len(batches) == 1:
        (window,) = batches
        half = next(iter(window.values())).shape[1] // 2
        if not half:
            raise BadInput("one calibration token", "gates are calibrated on some tokens and measured on others", "ask for more --calibration-tokens")
        return [{k: v[:, :half] for k, v in window.items()}], [{k: v[:, half:] for k, v in window.items()}]
    heldout = batches[HELDOUT - 1 :: HELDOUT] or batches[-1:]
    seen = {id(batch) for batch in heldout}
    return [batch for batch in batches if id(batch) not in seen], heldout


def _batches(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise BadInput(f"batch {text!r}", "batches are whole numbers above 0, separated by commas", "pass for example --batch 1,64")
    return tuple(int(part) for part in parts)


def gate_rows(gates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for the same place of every block: how many there are, and their mean density."""
    kinds: dict[tuple[str, str], list[float]] = {}
    for gate in gates:
        kinds.setdefault((gate["gate"], kin(gate["name"])), []).append(gate["density"])
    return [{"gate": kind, "on": place, "n": len(found), "density": sum(found) / len(found)} for (kind, place), found in kinds.items()]


def _draw(r: dict[str, Any]) -> None:
    line(f"{r['packed']} of {len(r['sites'])} matrices packed: {megabytes(r['bytes_dense'])} became {megabytes(r['bytes_stored'])}; written to {r['out']}")
    for reason, count in Counter(s["dense_because"].partition(":")[0] for s in r["sites"] if s["dense_because"]).most_common(3):
        line(f"{count} stay dense: {reason}")
    if r["gates"]:
        table(gate_rows(r["gates"]), ["gate", "on", "n", "density"], "density: the share of held-out activations that stay")
    if "gating" in r:
        gating, ledger = r["gating"], r["gating"]["ledger"]
        asked = "" if gating["density_requested"] is None else f" where {text(gating['density_requested'])} was asked"
        line(f"{gating['gating']}: density {text(gating['density'])}{asked}, measured on {ledger['tokens']} held-out tokens")
        line(f"a token takes {ledger['macs_executed']:.4g} multiply-adds of its Linear matrices' {ledger['macs']:.4g}: {text(ledger['mac_density'])}")
