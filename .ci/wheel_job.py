"""The main job from an installed wheel: prune, pack and generate on a tiny Llama. `wheel_job.py native|absent`, run by the wheel's own Python."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

wanted = sys.argv[1]


def tiny(folder: Path) -> None:
    """A random Llama with a letter-level tokenizer, and a text."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {word: i for i, word in enumerate(["<s>", "<unk>", " ", *(chr(c) for c in range(97, 123))])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(letters), **sizes)).save_pretrained(folder)
    (folder / "text.txt").write_text("sparse networks choose what to keep " * 100)


def rarefy(*argv: str) -> str:
    """A verb in this process; its standard output."""
    from rarefy.cli.main import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(list(argv)) == 0, argv
    return out.getvalue()


def main() -> None:
    import rarefy as library
    from rarefy.kernels.library import describe, native

    home = Path(library.__file__).resolve()
    assert home.is_relative_to(Path(sys.prefix).resolve()), f"{home} is not the wheel's"
    said = subprocess.run([Path(sys.executable).with_name("rarefy"), "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert said.startswith(f"rarefy {library.__version__}\n"), said
    tiny(Path("tiny"))
    rarefy("prune", "tiny", "--recipe", "wanda", "--density", "0.5", "--calibration", "tiny/text.txt", "--calibration-tokens", "512", "--out", "half")
    packed = json.loads(rarefy("pack", "half", "--layout", "int8", "--out", "small", "--json"))
    assert packed["packed"] == 14, packed["packed"]
    written = json.loads(rarefy("generate", "small", "--prompt", "sparse ", "--tokens", "8", "--runs", "1", "--json"))
    assert written["tokens"] == 8, written
    if wanted == "native":
        assert native() is not None and native().openmp() and describe().startswith("native kernels ("), describe()
        assert "native kernels: none" not in said and "native kernels" in written["engine"], (said, written["engine"])
    else:
        assert native() is None and "without a compiler" in describe(), describe()
        assert "native kernels: none, everything runs in PyTorch, slower (they were not built" in said and written["engine"].startswith("transformers"), (said, written["engine"])
    one_openmp()
    print(f"{describe()}: pruned, packed and decoded by {written['engine']} from {home.parent}")


def one_openmp() -> None:
    """After a product of torch's and one of ours the process has torch's OpenMP runtime and no other."""
    import torch

    from rarefy.layouts import LAYOUTS

    weight = torch.randn(64, 64)
    assert torch.allclose(LAYOUTS["bitmask"].matrix(LAYOUTS["bitmask"].pack(weight), (64, 64), torch.float32).linear(torch.eye(64), None), weight.t(), atol=1e-5)
    (torch.randn(300, 300) @ torch.randn(300, 300)).sum()
    maps = Path("/proc/self/maps")
    if maps.exists():
        runtimes = {line.split()[-1] for line in maps.read_text().splitlines() if any(name in line for name in ("libgomp", "libiomp", "libomp"))}
        assert len(runtimes) == 1 and Path(*runtimes).resolve().is_relative_to(Path(torch.__file__).parent.parent.resolve()), runtimes


if __name__ == "__main__":
    main()
