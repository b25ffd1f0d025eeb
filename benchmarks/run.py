"""Measure and commit: `python -m benchmarks.run [products] [experts] [decode-float32 ...] [--isa avx2] [--models FOLDER] [--max-load 0.3]`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import decode, experts, products, quality
from rarefy.kernels.library import describe, instruction_set
from rarefy.probes.roofline import roofline
from rarefy.runtime.choose import processor

# What holds torch to an instruction set: it reads them as it is imported.
HELD = {"avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}}
HERE = Path(__file__).parent
WHAT = ["products", "experts", "quality", *(f"decode-{name}" for name in decode.RACES)]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    best = roofline()
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "kernels": describe(),
        "threads": torch.get_num_threads(),
        "read_gb_per_s": round(best.bytes_per_s / 1e9, 1),
        "float32_gflops": round(2 * best.macs_per_s / 1e9),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=WHAT, choices=WHAT)
    parser.add_argument("--models", default="out/benchmarks", help="where the models that race are kept")
    parser.add_argument("--max-load", type=float, default=0.3, help="refuse above this load a core")
    parser.add_argument("--isa", choices=list(HELD), help="hold our kernels and torch's to this instruction set; products only")
    asked = parser.parse_args()
    if asked.isa is not None and HELD[asked.isa].items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.run", *sys.argv[1:]], {**os.environ, **HELD[asked.isa]})
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if load > asked.max_load:
        sys.exit(f"a load of {load:.2f} a core is above {asked.max_load:g}: wait until the machine is quiet")
    plain = {"products": products.run, "experts": experts.run, "quality": quality.run}
    runs: dict[str, Callable[[], list[dict[str, Any]]]] = {name: partial(run, _note) for name, run in plain.items()}
    runs |= {f"decode-{name}": partial(decode.run, name, Path(asked.models), _note) for name in decode.RACES}
    held, end = (nullcontext(), "") if asked.isa is None else (instruction_set(asked.isa), f"-{asked.isa}")
    for name in asked.what if asked.isa is None else ["products"]:
        with held:
            began, before = time.monotonic(), machine()
            rows = runs[name]()
        command = f"python -m benchmarks.run {name}" + (f" --isa {asked.isa}" if asked.isa else "")
        result = {"command": command, "machine": before, "wall_s": round(time.monotonic() - began), "rows": rows}
        (HERE / "results" / f"{name}{end}.json").write_text(json.dumps(result, indent=1) + "\n")


def _note(done: int, every: int, what: str) -> None:
    sys.stderr.write(f"\r{done}/{every} {what:<60}")


if __name__ == "__main__":
    main()
