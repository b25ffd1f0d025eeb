"""The models that race: made once, each by the command that is printed beside it, in a folder of their own."""

from __future__ import annotations

from pathlib import Path

from rarefy.cli.main import main
from rarefy.hub.demo import MODEL

Q4_0, Q8_0, Q4_K_M = 2, 7, 15  # llama.cpp's file types

COMMANDS: dict[str, list[str]] = {
    "half": ["prune", "demo", "--recipe", "sparsegpt", "--density", "0.5"],
    "half-bitmask": ["pack", "{half}", "--layout", "bitmask"],
    "mild": ["prune", "demo", "--recipe", "sparsegpt", "--density", "0.825"],  # what keeps within 5% of perplexity
    "mild-bitmask": ["pack", "{mild}", "--layout", "bitmask"],
    "int4": ["pack", "demo", "--layout", "int4-asymmetric", "--embeddings", "int8"],
    "int4-gated": ["pack", "demo", "--layout", "int4-asymmetric", "--embeddings", "int8", "--gates", "uniform-threshold:density=0.8"],
}
GGUF = {"Q4_0": Q4_0, "Q8_0": Q8_0, "Q4_K_M": Q4_K_M}


def make(folder: Path) -> dict[str, str]:
    """{name: path}; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: str(folder / name) for name in COMMANDS}
    for name, command in COMMANDS.items():
        if not Path(paths[name]).exists():
            assert main([*(part.format(**paths) for part in command), "--out", paths[name]]) == 0, name
    for name, kind in GGUF.items():
        paths[name] = str(folder / f"{name}.gguf")
        if not Path(paths[name]).exists():
            _quantise(MODEL.path(), Path(paths[name]), kind)
    return paths


def _quantise(source: Path, out: Path, kind: int) -> None:
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = kind, True
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), options) == 0, out
