"""One product: the layouts and peers that performance targets name."""

from __future__ import annotations

from typing import Any

from rarefy.probes.bench import Subject, bench
from rarefy.probes.skip_bench import bench_skip

SHAPE = (2048, 8192)
DENSE, OWN, CSR = "torch-dense", "own-dense", "torch-csr"


def run(progress: Any) -> list[dict[str, Any]]:
    def linear(layouts: str, densities: list[float], batches: list[int], peers: list[str]) -> list[dict[str, Any]]:
        return bench([Subject.parse(text) for text in layouts.split(",")], [SHAPE], densities, batches, peers, progress=progress)

    def skip(layouts: str, peers: list[str]) -> list[dict[str, Any]]:
        return bench_skip([Subject.parse(text) for text in layouts.split(",")], [SHAPE], [0.5, 0.25], [1], peers, progress=progress)

    return [
        *linear("flat", [1.0], [1, 2, 4, 8], [DENSE]),
        *linear("bitmask,n_m@2:4", [0.5], [1], [DENSE, OWN]),
        *linear("csr,block@block:4x1", [0.1], [1, 64, 512], [DENSE, OWN, CSR]),
        *linear("csr,block@block:4x1", [0.5], [512], [DENSE]),
        *linear("int4@row-block:1x32", [0.5], [1], ["llama.cpp-q4_0", "llama.cpp-q4_K", "int4", OWN]),
        *linear("int4", [1.0], [1], ["llama.cpp-q4_0", "llama.cpp-q4_K", OWN]),
        *skip("columns", [DENSE, OWN]),
        *skip("int4-columns", ["int4", OWN]),
    ]
