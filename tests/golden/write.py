"""Wrote the golden folders of a release: `python -m tests.golden.write VERSION`. A folder that is there is never written again."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from rarefy.activations.attach import attach_gates
from rarefy.activations.gates.threshold import Threshold
from rarefy.activations.gates.topk import TopK
from rarefy.hub.packed import save_packed
from rarefy.kernels.library import SWITCH
from rarefy.surgery.narrow import narrow

HERE = Path(__file__).parent
IDS = torch.arange(12).view(2, 6)


def model() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    found = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True, initializer_range=0.2)).eval()
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if "proj" in name:
                weight.view(-1, 4).scatter_(1, torch.rand(weight.numel() // 4, 4).argsort(1)[:, :2], 0)  # 2:4
    return found


def embeddings(folder: Path) -> Any:
    save_packed(found := model(), None, folder, "bitmask", embeddings="int8")
    return found


def gates(folder: Path) -> Any:
    found = model()
    attach_gates(found, Threshold(density=0.5), ["*.mlp.down_proj"], [{"input_ids": IDS}])
    attach_gates(found, TopK(0.5), ["*.q_proj"])
    save_packed(found, None, folder, "n_m")
    return found


def int4(folder: Path) -> Any:
    save_packed(found := model(), None, folder, "int4-asymmetric", embeddings="int4")
    return found


def narrowed(folder: Path) -> Any:
    found = narrow(model(), {"model.layers.0.mlp": range(0, 40, 2)})
    save_packed(found, None, folder, "csr")
    return found


FOLDERS: dict[str, Callable[[Path], Any]] = {"embeddings": embeddings, "gates": gates, "int4": int4, "narrow": narrowed}


def main() -> None:
    os.environ[SWITCH] = "off"  # native kernels sum in another order, and round x to 8 bits for int8 and int4
    for name, write in FOLDERS.items():
        folder = HERE / sys.argv[1] / name
        if folder.exists():
            continue
        write(folder / "model")
        again: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
        with torch.no_grad():
            values = {"logits": again(IDS).logits.contiguous()}
        (folder / "expected").mkdir()
        save_file(values, folder / "expected" / "values.safetensors")


if __name__ == "__main__":
    main()
