"""Measure and commit: `python -m benchmarks.run [products] [decode] [--models FOLDER] [--max-load 0.3]`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import decode, products
from rarefy.kernels.library import describe
from rarefy.probes.roofline import roofline
from rarefy.runtime.choose import processor

HERE = Path(__file__).parent


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
    parser.add_argument("what", nargs="*", default=["products", "decode"], choices=["products", "decode"])
    parser.add_argument("--models", default="out/benchmarks", help="where the models that race are kept")
    parser.add_argument("--max-load", type=float, default=0.3, help="refuse above this load a core")
    asked = parser.parse_args()
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if load > asked.max_load:
        sys.exit(f"a load of {load:.2f} a core is above {asked.max_load:g}: wait until the machine is quiet")
    runs = {"products": lambda: products.run(_note), "decode": lambda: decode.run(Path(asked.models), _note)}
    for name in asked.what:
        began, before = time.monotonic(), machine()
        rows = runs[name]()
        result = {"command": f"python -m benchmarks.run {name}", "machine": before, "wall_s": round(time.monotonic() - began), "rows": rows}
        (HERE / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def _note(done: int, every: int, what: str) -> None:
    sys.stderr.write(f"\r{done}/{every} {what:<60}")


if __name__ == "__main__":
    main()
