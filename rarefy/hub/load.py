"""Load a model by Hugging Face name, folder, GGUF file, or `demo`."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rarefy.core.errors import BadFile, BadInput, MissingExtra, RarefyError, Refused
from rarefy.hub.cache import cached_folder
from rarefy.hub.demo import MODEL, sha256

DEMO = "demo"
GGUF_FORMAT = 2  # of our converted folder; raise it when `_convert` writes something else
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}
_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
_BROKEN = (SafetensorError, RuntimeError, KeyError, IndexError, EOFError, struct.error)


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, its tokenizer (None where the folder holds none), the folder it came from, what was asked for."""

    model: Any
    tokenizer: Any
    source: Path
    spec: str


@dataclass(frozen=True)
class LoadTask:
    """Which auto class loads a model, and which of its parameters may start untrained."""

    auto: str
    fresh: tuple[str, ...] = ()


TASKS = {
    "causal-lm": LoadTask("AutoModelForCausalLM"),
    "encoder": LoadTask("AutoModel", ("pooler.",)),
    "classifier": LoadTask("AutoModelForSequenceClassification", ("classifier.", "pre_classifier.", "score.", "bert.pooler.")),
    "image-classifier": LoadTask("AutoModelForImageClassification", ("classifier.",)),
}


def load(model_spec: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu", task: str = "causal-lm") -> Loaded:
    """Load a model and its tokenizer.

    `model_spec`: a folder; a ``.gguf`` file (dequantised once to float32, cached); ``demo``; or a Hugging Face name,
    with ``@revision`` if wanted. `dtype` None keeps the stored one; `task` is a key of `TASKS`. Code that a model
    ships is never run.

    Raises BadInput (unknown name, dtype, device, task), BadFile (truncated or not a model, weights missing),
    MissingExtra (transformers, the demo's package).
    """
    spec = str(model_spec)
    if task not in TASKS:
        raise BadInput(f"task is {task!r}", f"known tasks are {', '.join(TASKS)}")
    kind, target = torch_dtype(dtype), torch_device(device)
    if find_spec("transformers") is None:
        raise MissingExtra("transformers", "hub")
    where, revision = resolve(spec)
    model = _model(where, revision, TASKS[task], kind, spec)
    model.config._name_or_path = spec
    return Loaded(model.to(target).eval(), tokenizer_of(where, revision), _folder(where, revision), spec)


def torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by name.

    >>> torch_dtype("bf16")
    torch.bfloat16
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise BadInput(f"dtype is {dtype!r}", f"known dtypes are {', '.join(DTYPES)}")
    return DTYPES[dtype]


def torch_device(device: str | torch.device) -> torch.device:
    """A device by name, present on this machine."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device is {str(device)!r}", "this machine has no such device", "pass for example --device cpu") from error
    if found.type == "meta":
        raise BadInput("device is 'meta'", "it holds no weights", "pass for example --device cpu; rarefy prune --stream leaves the weights in their files")
    return found


def resolve(spec: str) -> tuple[str, str | None]:
    """Where to load from, a folder or a hub name, and the revision; GGUF files are converted on the way."""
    if spec == DEMO:
        return str(gguf_folder(MODEL.path())), None
    path = Path(spec).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        return str(gguf_folder(path)), None
    if path.is_dir():
        return _model_folder(path), None
    match = _NAME.fullmatch(spec)
    if match is None or spec.startswith((".", "~")):
        raise BadInput(f"{spec!r}", "is neither an existing folder or .gguf file nor a Hugging Face name", f"pass a path, owner/name, or {DEMO}")
    return match["name"], match["revision"]


def _model_folder(path: Path) -> str:
    if (path / "config.json").is_file():
        return str(path)
    inside = sorted(path.glob("*.gguf"))
    if len(inside) != 1:
        raise BadFile(
            str(path), "is not a model folder: it holds no config.json" + (f" and {len(inside)} .gguf files" if inside else ""), "name a folder written by save_pretrained"
        )
    return str(gguf_folder(inside[0]))


def gguf_folder(path: Path) -> Path:
    """The cached float32 safetensors folder of a GGUF file, keyed by its content and the versions that convert it."""
    if not path.is_file():
        raise BadInput(str(path), "no such file")
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise BadFile(str(path), "is not a GGUF file", "pass a .gguf file or a model folder")
    if find_spec("gguf") is None:
        raise MissingExtra("gguf", "hub")
    made_from: dict[str, Any] = {"file": path.name, "sha256": sha256(path), "format": GGUF_FORMAT} | {name: _version(name) for name in ("torch", "transformers", "gguf")}
    key = "-".join([path.stem, made_from["sha256"][:16], f"f{GGUF_FORMAT}", *(f"{n}{made_from[n]}" for n in ("torch", "transformers", "gguf"))])
    return cached_folder(re.sub(r"[^\w.+-]", "_", key), lambda folder: _convert(path, folder), made_from)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _convert(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        _refuse_what_is_dropped(path)
        model: Any = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Refused:
        raise
    except BaseException as error:  # tokenizers raises bare Exception on an inconsistent vocabulary, or panics
        if isinstance(error, MemoryError) or not (isinstance(error, Exception) or _is_rust_panic(error)):
            raise
        raise BadFile(str(path), f"cannot be read as GGUF ({_first_line(error)})", "download it again") from error
    # transformers refuses to save what it loaded from GGUF although the tensors are plain float32 by now.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _refuse_what_is_dropped(path: Path) -> None:
    """Refused: transformers would read the file, and compute something else, or lack what this library needs of it."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = reader.fields
    scaling = [str(fields[key].contents()) for key in fields if key.endswith(".rope.scaling.type")]
    scaled = [kind for kind in scaling if kind != "none"] + ["by rope_freqs.weight" for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    if scaled:
        raise Refused(
            f"{path}: its rotary positions are scaled ({scaled[0]})",
            "transformers drops that from a GGUF file and would compute something else",
            "name the folder it was made from",
        )
    if "tokenizer.ggml.model" not in fields:
        raise Refused(f"{path}: it holds no tokenizer", "a GGUF file is read with the tokenizer inside it", "name the folder it was made from")


def _is_rust_panic(error: BaseException) -> bool:
    # pyo3 exports no class to catch, and it is no Exception.
    return type(error).__name__ == "PanicException"


def _model(where: str, revision: str | None, task: LoadTask, dtype: torch.dtype | None, spec: str) -> Any:
    import transformers

    auto = getattr(transformers, task.auto)
    try:
        model, info = auto.from_pretrained(where, revision=revision or "main", dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True)
    except RarefyError:
        raise
    except (MemoryError, OSError, RuntimeError, SafetensorError) as error:
        if not _no_memory(error):
            raise (_unreadable if isinstance(error, OSError) else _broken)(where, spec, error) from error
        raise Refused(spec, "its weights do not fit in memory", "prune it with --stream, or pass a smaller --dtype") from error
    except ValueError as error:
        raise BadInput(spec, f"cannot be loaded with {task.auto} ({_first_line(error)})", "check the task, or whether the model needs code of its own") from error
    except _BROKEN as error:
        raise _broken(where, spec, error) from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(task.fresh or ("\0",)))
    if missing:
        raise BadFile(spec, f"holds no weights for {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""), "they would be random numbers; save it again")
    return model


def _no_memory(error: BaseException) -> bool:
    # safetensors and torch name it only in the text, transformers wraps the error once more.
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in ("cannot allocate memory", "can't allocate memory", "bad_alloc"))


def _broken(where: str, spec: str, error: BaseException) -> BadFile:
    return BadFile(spec, f"its weights are truncated or do not fit its config ({_first_line(error)})", "download or save it again")


def _unreadable(where: str, spec: str, error: BaseException) -> BadFile | BadInput:
    if Path(where).is_dir():
        return BadFile(spec, f"is not a complete model folder ({_first_line(error)})", "it needs config.json and weights")
    return BadInput(spec, "no such folder here, and no such model on the Hugging Face hub or in its cache", "check the spelling, your connection, and your access")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160].rstrip(".:")


def tokenizer_of(where: str, revision: str | None) -> Any:
    """The tokenizer of a folder or hub name, or None where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _folder(where: str, revision: str | None) -> Path:
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(where, "config.json", revision=revision or "main")).parent


def parameters_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())
