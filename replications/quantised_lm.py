"""What rounding costs a character model of ours that was trained in float32, dense and with half of its weights out: three seeds.

The demo's model comes from a Q4_1 file, so that int4-asymmetric is lossless on it by construction; this one has never been rounded. Every
form is packed, written, loaded again, and scored twice: with its weights unpacked and float32 products, and as the native engine decodes it.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from rarefy.cli import names
from rarefy.core.search import trial
from rarefy.hub.load import load
from rarefy.hub.packed import save_packed
from rarefy.hub.text import calibration_articles, heldout_articles
from rarefy.probes.perplexity import token_nll
from rarefy.probes.racers.hosted import hosted
from rarefy.surgery.adapters.full import Full
from rarefy.surgery.heal import Training, heal
from rarefy.weights.optimize import relative_loss
from rarefy.weights.patterns import parse_pattern
from rarefy.weights.prune import prune

SLUG = None
NAME = "on a character LM trained in float32, int8 costs at most 0.5% of perplexity and int4 with zeros at most 5%, by the upper end of the interval"
SOURCES = (
    "rarefy/layouts/grouped.py",
    "rarefy/layouts/bits.py",
    "rarefy/kernels/grouped/__init__.py",
    "rarefy/kernels/grouped/reference.py",
    "rarefy/hub/packed.py",
    "rarefy/hub/text.py",
    "rarefy/surgery/heal.py",
    "rarefy/surgery/adapters/full.py",
    "rarefy/weights/solvers/sparsegpt.py",
)
SEEDS, STEPS, ROWS, SPAN, RATE = (0, 1, 2), 500, 16, 128, 3e-3
CALIBRATION, HEALING, HEALING_RATE, SCORED = 32, 80, 1e-3, 16_384  # windows, steps, learning rate, characters
LOSSLESS = "bitmask"  # float32; a matrix that it makes no smaller stays dense
LAYOUTS = ("int8", "int4", "int4-asymmetric")
SPARSE = {"dense": None, "half of the weights": "matrix", "half of the groups of 32": "row-block:1x32"}
CEILING = {"int8": 0.005, "int4-asymmetric": 0.05}


def characters(articles: tuple[str, ...]) -> Tensor:
    """ASCII, int64 [N]; anything else is a question mark."""
    return torch.frombuffer(bytearray("\n\n".join(articles).encode("ascii", "replace")), dtype=torch.uint8).long()


def windows(text: Tensor, count: int, seed: int) -> Tensor:
    start = torch.randint(len(text) - SPAN - 1, (count,), generator=torch.Generator().manual_seed(seed))
    return text[start[:, None] + torch.arange(SPAN + 1)]


def trained(text: Tensor, seed: int) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        ids = windows(text, ROWS, seed * 1_000_003 + step)
        loss = F.cross_entropy(model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def sparsify(model: LlamaForCausalLM, text: Tensor, pattern: str | None, seed: int) -> None:
    """Half out by SparseGPT, then every kept weight healed; in place."""
    if pattern is None:
        return
    calibration = [{"input_ids": w[None]} for w in windows(text, CALIBRATION, seed + 10_000_019)]
    prune(model, calibration, dataclasses.replace(names.recipe("sparsegpt"), pattern=parse_pattern(pattern)), density=0.5, errors=False)
    healing = [w[None] for w in windows(text, HEALING * ROWS, seed + 20_000_003)]
    heal(model, healing, Full(), training=Training(lr=HEALING_RATE, batch=ROWS, seed=seed))


def score(model: Any, held_out: Tensor) -> Tensor:
    return token_nll(model, held_out, SPAN + 1)


def decoded(loaded: Any, held_out: Tensor) -> Tensor:
    """The same characters by the native engine's own arithmetic."""
    return torch.cat(hosted("form", loaded, "native").nll(list(held_out.split(SPAN + 1))))


def forms(model: LlamaForCausalLM, held_out: Tensor, folder: Path) -> dict[str, dict[str, Any]]:
    """{layout: nll of each character, by either arithmetic, bytes and mean density of the matrices}."""
    found: dict[str, dict[str, Any]] = {}
    for layout in (LOSSLESS, *LAYOUTS):
        record = save_packed(model, None, folder / layout, layout)
        density = statistics.fmean(site["density"] for site in record["sites"])
        unpacked, native = score(load(folder / layout).model, held_out), decoded(load(folder / layout), held_out)
        found[layout] = {"unpacked": unpacked, "native": native, "bytes": record["bytes_stored"], "density": density}
    return found


def scored(forms: Sequence[dict[str, Any]], exact: Sequence[dict[str, Any]], arithmetic: str) -> dict[str, Any]:
    """Nats a character of each seed, and how much perplexity rose over the same weights in float32, over seeds, with the interval over the text."""
    after, before = (torch.stack(nlls).mean(0) for nlls in ([f[arithmetic] for f in forms], [f["unpacked"] for f in exact]))
    rise = relative_loss(before, after)
    return {"nats_each_seed": [float(f[arithmetic].double().mean()) for f in forms], "rise": {"value": rise.value, "interval": list(rise.interval)}}


def row(what: str, layout: str, forms: Sequence[dict[str, Any]], exact: Sequence[dict[str, Any]], dense: Sequence[dict[str, Any]]) -> dict[str, Any]:
    both = {arithmetic: scored(forms, exact, arithmetic) for arithmetic in ("unpacked", "native")}
    both["over_dense"] = scored(forms, dense, "unpacked")["rise"]
    return {"what": what, "layout": layout, "density": forms[0]["density"], "bytes": forms[0]["bytes"], "float32_bytes": exact[0]["bytes"], **both}


def run() -> tuple[dict[str, Any], bool]:
    """(a row for each form, whether the dense model's int8 and int4-asymmetric are within their ceilings)."""
    text, held_out = characters(calibration_articles()), characters(heldout_articles())[:SCORED]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in SEEDS:
        model = trained(text, seed)
        for name, pattern in SPARSE.items():
            with trial(model), tempfile.TemporaryDirectory() as folder:
                sparsify(model, text, pattern, seed)
                for layout, form in forms(model, held_out, Path(folder)).items():
                    found.setdefault((name, layout), []).append(form)
    rows = [row(name, layout, each, found[name, LOSSLESS], found[next(iter(SPARSE)), LOSSLESS]) for (name, layout), each in found.items()]
    within = [r["native"]["rise"]["interval"][1] <= CEILING[r["layout"]] for r in rows if r["what"] == "dense" and r["layout"] in CEILING]
    figures = {"seeds": list(SEEDS), "steps": STEPS, "characters": STEPS * ROWS * SPAN, "scored": SCORED, "window": SPAN + 1, "ceiling": CEILING, "rows": rows}
    return figures, all(within)
