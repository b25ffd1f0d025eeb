"""SmolLM2-135M pruned one-shot by SparseGPT, healed by each method from the same weights, on the same windows, in the same order and number of steps.

Each method's learning rate is the best of a pilot: a few steps on training windows, scored on windows that no healing sees. Besides: how
much density the best healer (on those windows) needs to come back within 5% of dense, and, because healing also teaches the text's
style, what the same training does to a model that lost 1% of its smallest weights, which is nothing.

Products of training are rounded to bfloat16, weights, gradients and every score are float32.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rarefy import catalogue
from rarefy.cli import names
from rarefy.cli.heal import texts
from rarefy.core.journal import Journal
from rarefy.core.search import trial
from rarefy.hub.cache import cache_dir
from rarefy.hub.load import Loaded, load
from rarefy.hub.text import WINDOW, calibration_batches
from rarefy.probes.perplexity import bootstrap, token_nll
from rarefy.surgery.adapters import Adaptation
from rarefy.surgery.adapters.full import Full
from rarefy.surgery.adapters.lora import MaskedLora
from rarefy.surgery.adapters.lors import Lors
from rarefy.surgery.adapters.spp import Spp
from rarefy.surgery.distil import Teacher
from rarefy.surgery.heal import Training, heal
from rarefy.weights.optimize import relative_loss
from rarefy.weights.prune import prune
from rarefy.weights.sites import find_sites

SLUG = ("spp", "lors")
NAME = "half of SmolLM2-135M pruned, then healed by any method: perplexity falls beyond its interval, no zero is lost"
SOURCES = (
    "rarefy/surgery/heal.py",
    "rarefy/surgery/distil.py",
    "rarefy/surgery/gradients.py",
    "rarefy/surgery/adapters/__init__.py",
    "rarefy/surgery/adapters/spp.py",
    "rarefy/surgery/adapters/lors.py",
    "rarefy/surgery/adapters/lora.py",
    "rarefy/surgery/adapters/full.py",
    "rarefy/weights/solvers/sparsegpt.py",
)
START, BUDGET, EASIER = ("sparsegpt", 0.5), 0.05, (0.7,)
CALIBRATION, TRAINED, RESERVED, SCORED = 8192, 16_384, 2048, 8192  # tokens
PILOT, FACTORS = 6, (1.0, 3.0, 10.0)  # steps, times the method's own learning rate
SEEDS = (0,)
TAUGHT = "full, distilled"
METHODS: dict[str, Adaptation] = {"spp": Spp(), "lors": Lors(), "masked-lora": MaskedLora(), TAUGHT: Full()}


class Bench:
    """The dense model, its texts, and finished rows, which a run that was stopped does not repeat."""

    def __init__(self) -> None:
        root = Path(__file__).parent.parent
        code = catalogue.digest([root / s for s in SOURCES])
        self.folder = cache_dir() / "replications" / f"heal_methods-{code[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.folder / "rows.json", f"{CALIBRATION} {TRAINED} {RESERVED} {SCORED}")
        self.reused = 0
        self.loaded: Loaded = load("demo")
        self.teacher = Teacher(load("demo").model)
        windows, self.held_out = texts(self.loaded, TRAINED + RESERVED, None, None, SCORED, 0)
        apart = RESERVED // WINDOW
        every = len(windows) // apart
        self.reserved = torch.cat([w[0, 1:] for w in windows[::every][:apart]])
        self.windows = [w for i, w in enumerate(windows) if i % every or i // every >= apart]
        self.dense = self.row("dense", lambda: {"nll": self.nll(self.held_out)})

    def row(self, key: str, make: Any) -> dict[str, Any]:
        found = self.journal.get(key)
        self.reused += found is not None
        if found is None:
            self.journal.put(key, found := make())
            print(f"  {key}: {' '.join(f'{k} {v:.4g}' for k, v in found.items() if isinstance(v, float))}", flush=True)
        return found

    def nll(self, ids: Tensor) -> list[float]:
        return token_nll(self.loaded.model, ids, WINDOW, bos=self.loaded.tokenizer.bos_token_id).tolist()

    def weights(self, recipe: str, density: float) -> dict[str, Tensor]:
        """The pruned model's parameters, pruned once."""
        path = self.folder / f"{recipe}-{density}.safetensors"
        if not path.is_file():
            with trial(self.loaded.model) as model:
                prune(model, calibration_batches(self.loaded.tokenizer, CALIBRATION), names.recipe(recipe), density=density, errors=False)
                save_file({name: p.detach() for name, p in model.named_parameters()}, path)
        return load_file(path)

    @contextmanager
    def pruned(self, recipe: str, density: float) -> Iterator[nn.Module]:
        with trial(self.loaded.model) as model:
            model.load_state_dict(self.weights(recipe, density), strict=False)  # a tied head has no key of its own
            yield model

    def before(self, recipe: str, density: float) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            with self.pruned(recipe, density) as model:
                matrices = [model.get_parameter(site.key) for site in find_sites(model)]
                kept = sum(int(torch.count_nonzero(m)) for m in matrices) / sum(m.numel() for m in matrices)
                return {"density": kept, "nll": self.nll(self.held_out)}

        return self.row(f"{recipe} {density}", make)

    def healed(self, start: tuple[str, float], name: str, windows: Sequence[Tensor], lr: float, seed: int, score: bool) -> dict[str, Any]:
        """A pruned model healed by a method."""

        def make() -> dict[str, Any]:
            with self.pruned(*start) as model:
                with rounded_products():
                    found = heal(model, windows, METHODS[name], teacher=self.teacher if name == TAUGHT else None, training=Training(lr=lr, seed=seed))
                kept = {k: found[k] for k in ("steps", "tokens", "trained_parameters", "zeros")}
                reserved = statistics.fmean(self.nll(self.reserved))
                return {**kept, "lr": lr, "reserved": reserved, **({"nll": self.nll(self.held_out)} if score else {})}

        return self.row(f"{start} {name} lr {lr:g} seed {seed} {len(windows)} windows", make)


@contextmanager
def rounded_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def perplexity(nll: Sequence[float]) -> dict[str, Any]:
    """Perplexity and the 95% interval over windows, as the library's `perplexity` has them."""
    parts = torch.tensor(nll, dtype=torch.float64).split(WINDOW - 1)
    limits = bootstrap(torch.stack([p.sum() for p in parts]), torch.tensor([float(len(p)) for p in parts]))
    assert limits is not None
    return {"perplexity": float(torch.tensor(nll, dtype=torch.float64).mean().exp()), "interval": torch.tensor(limits, dtype=torch.float64).exp().tolist()}


def change(over: Sequence[float], nll: Sequence[float]) -> dict[str, Any]:
    """The relative change of perplexity on the same tokens, with its paired interval."""
    found = relative_loss(torch.tensor(over, dtype=torch.float64), torch.tensor(nll, dtype=torch.float64))
    return {"value": found.value, "interval": list(found.interval)}


def averaged(rows: Sequence[dict[str, Any]]) -> list[float]:
    return torch.tensor([r["nll"] for r in rows], dtype=torch.float64).mean(0).tolist()


def piloted(bench: Bench) -> dict[str, dict[str, Any]]:
    """The learning rate of each method, with what each factor gave on the reserved windows."""
    chosen = {}
    for name, method in METHODS.items():
        tried = {f"{method.lr * f:g}": bench.healed(START, name, bench.windows[:PILOT], method.lr * f, 0, score=False)["reserved"] for f in FACTORS}
        chosen[name] = {"lr": float(min(tried, key=lambda lr: tried[lr])), "reserved_nll": tried}
    return chosen


def half(bench: Bench, before: Sequence[float], rates: dict[str, float]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each method, and one for each pair of them."""
    found = {name: [bench.healed(START, name, bench.windows, lr, seed, score=True) for seed in SEEDS] for name, lr in rates.items()}
    rows = []
    for name, runs in found.items():
        nll = averaged(runs)
        each = [perplexity(r["nll"])["perplexity"] for r in runs]
        facts = {k: runs[0][k] for k in ("steps", "tokens", "trained_parameters", "lr")}
        zeros = {"before": runs[0]["zeros"]["before"], "lost": sum(r["zeros"]["lost"] for r in runs)}
        reserved = statistics.fmean(r["reserved"] for r in runs)
        rows.append(
            {
                "method": name,
                **facts,
                "zeros": zeros,
                "reserved_nll": reserved,
                "each_seed": each,
                **perplexity(nll),
                "over_pruned": change(before, nll),
                "over_dense": change(bench.dense["nll"], nll),
            }
        )
    pairs = [{"a": a, "b": b, "a_over_b": change(averaged(found[b]), averaged(found[a]))} for a, b in itertools.combinations(found, 2)]
    return rows, pairs


def easier(bench: Bench, best: str, lr: float, recipe: str, density: float) -> dict[str, Any]:
    """The best healer at another density."""
    before = bench.before(recipe, density)
    after = bench.healed((recipe, density), best, bench.windows, lr, 0, score=True)
    dense = bench.dense["nll"]
    return {
        "recipe": recipe,
        "density": before["density"],
        "pruned": {**perplexity(before["nll"]), "over_dense": change(dense, before["nll"])},
        "healed": {**perplexity(after["nll"]), "over_dense": change(dense, after["nll"]), "zeros_lost": after["zeros"]["lost"]},
    }


def run() -> tuple[dict[str, Any], bool]:
    """(rows, pairs, the pilot, the easier densities and the control; whether every method healed beyond its interval and lost no zero)."""
    bench = Bench()
    before = bench.before(*START)
    pilot = piloted(bench)
    rows, pairs = half(bench, before["nll"], {name: found["lr"] for name, found in pilot.items()})
    best = min(rows, key=lambda r: r["reserved_nll"])
    levels = [easier(bench, best["method"], best["lr"], "sparsegpt", density) for density in EASIER]
    control = easier(bench, best["method"], best["lr"], "magnitude", 0.99)
    dense = bench.dense["nll"]
    within = [r["density"] for r in levels if r["healed"]["over_dense"]["value"] <= BUDGET]
    figures = {
        "tokens": {"calibration": CALIBRATION, "trained": TRAINED, "reserved": RESERVED, "scored": SCORED, "window": WINDOW},
        "seeds": list(SEEDS),
        "dense": perplexity(dense),
        "pruned": {"density": before["density"], **perplexity(before["nll"]), "over_dense": change(dense, before["nll"])},
        "pilot": {"steps": PILOT, "methods": pilot},
        "options": {name: vars(method) for name, method in METHODS.items()},
        "healed": rows,
        "pairs": pairs,
        "best_on_reserved": best["method"],
        "levels": levels,
        "least_density_within_budget": min(within, default=None),
        "budget": BUDGET,
        "control": control,
        "rows_of_earlier_runs": bench.reused,
    }
    return figures, all(r["over_pruned"]["interval"][1] < 0 and r["zeros"]["lost"] == 0 for r in rows)
