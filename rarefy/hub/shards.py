"""A model larger than memory: on the meta device, with a module's tensors read from the folder's shards while it is used.

What is in memory at a time is one block (or one module outside the blocks), its statistics, and the hidden states.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rarefy.core.errors import BadFile, Refused
from rarefy.core.records import Site
from rarefy.hub.converted import Converted
from rarefy.hub.load import TASKS, Loaded, resolve, tokenizer_of, torch_device, torch_dtype
from rarefy.hub.plan import METHOD, NAMED
from rarefy.hub.tensor_file import write_tensors
from rarefy.weights.blocks import Calls, capture, hidden_of
from rarefy.weights.checkpoint import Checkpoint, digest
from rarefy.weights.source import Weights

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "50GB"  # what save_pretrained splits at


class ShardedWeights(Weights):
    """The tensors of a model on the meta device, read from safetensors files when a module is used and dropped after it.

    Pruned sites are read from the checkpoint that the prune keeps; `write` puts both together as a model folder.

    Args:
        model: parameters on the meta device, buffers in memory.
        files: {state-dict key: the file that holds it}; one key of a tied tensor is enough.
        device: where tensors are put.

    Raises:
        Refused: tied tensors are stored with different values.
        BadFile: a file is truncated, or holds no weights for a parameter of the model.
    """

    streamed = True

    def __init__(self, model: nn.Module, files: Mapping[str, Path], device: torch.device | str = "cpu") -> None:
        super().__init__(model)
        self.files, self.device = files, device
        self.empty = dict(model.named_parameters())
        self._names = {id(tensor): key for key, tensor in self.empty.items()}
        self._holders: dict[str, list[tuple[nn.Module, str]]] = defaultdict(list)
        self._below: dict[str, list[str]] = {}  # module -> keys of its own parameters
        self._users: Counter[str] = Counter()
        self._passed: set[nn.Module] = set()  # blocks that hand their input on
        self._pruned: dict[str, list[Callable[[Tensor], None]]] = defaultdict(list)  # what turns a stored tensor into a pruned one
        self._aliases: dict[str, str] = {}  # key -> the name that it is stored under
        self._survey()
        self._converted = Converted(model, files)
        buffers = [name for name in model.state_dict() if name not in self._aliases and name not in self._tied()]
        absent = [key for key in (*self.empty, *buffers) if key not in self._aliases and key not in self._converted.sources]
        if absent:
            raise BadFile(str(next(iter(files.values())).parent), f"holds no weights for {absent[0]}", "they would be random numbers; save the model again")
        for name in buffers:
            if name not in self.empty:
                model.get_buffer(name).copy_(self._source(name))
        for module in model.modules():
            module._buffers.update({name: buffer.to(device) for name, buffer in module._buffers.items() if buffer is not None})

    def _survey(self) -> None:
        """Who holds which parameter, and under which of its names it is stored."""
        for path, module in self.model.named_modules():
            own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
            self._below[path] = [self._names[id(tensor)] for tensor in own.values()]
            for name, key in zip(own, self._below[path], strict=True):
                self._holders[key].append((module, name))
        for name, tensor in self.model.named_parameters(remove_duplicate=False):
            if name in self.files:
                self._alias(self._names[id(tensor)], name)

    def _alias(self, key: str, name: str) -> None:
        """A tied tensor may be stored under several of its names, and must be the same then."""
        known = self._aliases.setdefault(key, name)
        if known != name and not torch.equal(self._stored(known), self._stored(name)):
            raise Refused(f"streaming {type(self.model).__name__}", f"{key} and {name} are tied and stored with different values", "prune in memory (--no-stream)")

    def _tied(self) -> set[str]:
        """The other names of tied parameters."""
        return {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - self.empty.keys()

    def tensors(self) -> Mapping[str, Tensor]:
        return _Lazy([*self.empty, *(name for name, _ in self.model.named_buffers())], self.read)

    def read(self, key: str) -> Tensor:
        """A tensor as it is by now: stored, or pruned."""
        if key not in self.empty:
            return self.model.get_buffer(key)
        tensor = self._source(key).to(device=self.device, dtype=self.empty[key].dtype)
        for write in self._pruned[key]:
            write(tensor)
        return tensor

    def _source(self, key: str) -> Tensor:
        return self._stored(self._aliases[key]) if key in self._aliases else self._converted.load(key, self._stored)

    def _stored(self, name: str) -> Tensor:
        try:
            with safe_open(self.files[name], "pt") as file:
                return file.get_tensor(name).clone()  # else the whole file stays mapped
        except (SafetensorError, OSError) as error:
            raise BadFile(str(self.files[name]), f"{name} cannot be read ({error})", "download or save the model again") from error

    @contextmanager
    def hold(self, modules: Iterable[str]) -> Iterator[None]:
        keys = [key for path in dict.fromkeys(modules) for key in self._keys(path)]
        self._take(keys)
        try:
            yield
        finally:
            self._drop(keys)

    @contextmanager
    def watched(self) -> Iterator[None]:
        hooks = [hook for path, keys in self._units() for hook in self._watch(self.model.get_submodule(path), keys)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._drop(list(self._users.elements()))

    def finished(self, sites: Iterable[Site], checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            return
        for site in sites:
            self._pruned[site.key].append(partial(self._stored_site, checkpoint, site))
            if checkpoint.holds(f"bias:{site.name}"):
                bias = self._names[id(self.empty[f"{site.module}.bias".lstrip(".")])]
                self._pruned[bias].append(partial(self._stored_bias, checkpoint, site))

    def _stored_site(self, checkpoint: Checkpoint, site: Site, tensor: Tensor) -> None:
        site.write(tensor, checkpoint.tensor(f"weight:{site.name}").to(self.device))

    def _stored_bias(self, checkpoint: Checkpoint, site: Site, tensor: Tensor) -> None:
        tensor.copy_(checkpoint.tensor(f"bias:{site.name}"))

    def _keys(self, path: str) -> list[str]:
        return [key for below, keys in self._below.items() if not path or below == path or below.startswith(path + ".") for key in keys]

    def _units(self) -> Iterator[tuple[str, list[str]]]:
        """Modules and what they take: every block of a list with all below it, every other module with its own parameters."""
        blocks = list(_blocks(self.model))
        yield from ((path, self._keys(path)) for path in blocks)
        yield from ((path, keys) for path, keys in self._below.items() if keys and not any(path == b or path.startswith(b + ".") for b in blocks))

    def _watch(self, module: nn.Module, keys: list[str]) -> tuple[RemovableHandle, RemovableHandle]:
        def before(*_: Any) -> None:
            self._take([] if module in self._passed else keys)

        def after(*_: Any) -> None:
            self._drop([] if module in self._passed else keys)

        return module.register_forward_pre_hook(before, prepend=True), module.register_forward_hook(after, always_call=True)

    def capture(self, chain: Sequence[tuple[str, nn.Module]], batches: Sequence[Any]) -> list[Calls]:
        """As in memory, without reading every block once per batch where the first batch shows that this changes nothing."""
        tuples: set[bool] = set()
        hooks = [block.register_forward_hook(lambda _, __, output: tuples.add(isinstance(output, tuple))) for _, block in chain]
        calls = capture(self.model, chain, batches[:1])
        for hook in hooks:
            hook.remove()
        if len(batches) > 1 and tuples == {False}:
            with self._passing([block for _, block in chain]):
                if _same(capture(self.model, chain, batches[:1])[0], calls[0]):
                    return calls + capture(self.model, chain, batches[1:])
        return calls + capture(self.model, chain, batches[1:])

    @contextmanager
    def _passing(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """These blocks return the hidden states that they are called with."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return hidden_of(args, kwargs)

        self._passed.update(blocks)
        try:
            for block in blocks:
                block.forward = forward
            yield
        finally:
            for block in blocks:
                vars(block).pop("forward", None)
            self._passed.clear()

    def _take(self, keys: list[str]) -> None:
        for key in keys:
            if not self._users[key]:
                self._place(key, nn.Parameter(self.read(key), requires_grad=self.empty[key].requires_grad))
            self._users[key] += 1

    def _drop(self, keys: list[str]) -> None:
        for key in keys:
            self._users[key] -= 1
            if not self._users[key]:
                self._place(key, self.empty[key])

    def _place(self, key: str, parameter: Tensor) -> None:
        for module, name in self._holders[key]:
            module._parameters[name] = parameter  # type: ignore[assignment]

    def write(self, folder: Path) -> None:
        """The model folder that `save_pretrained` would write of the pruned model, tensor by tensor.

        The same bytes where it is one file; in a folder of several a layer's experts may lie in more shards than there.
        """
        from huggingface_hub import split_torch_state_dict_into_shards

        model: Any = self.model
        model.config.dtype = str(model.dtype).split(".")[1]
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        left_out = {*self._tied(), *(model._keys_to_ignore_on_save or ())}
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
        state, read = self._converted.save(state, self.read)
        split = split_torch_state_dict_into_shards(state, max_shard_size=SHARD, filename_pattern="model{suffix}.safetensors")
        for file, names in split.filename_to_tensors.items():
            write_tensors(folder / file, {n: (state[n].dtype, tuple(state[n].shape)) for n in names}, read, {"format": "pt"})
        if split.is_sharded:
            index = {"metadata": {"total_parameters": model.num_parameters(), **split.metadata}, "weight_map": split.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _same(left: Calls, right: Calls) -> bool:
    return digest(left.hidden, left.rest) == digest(right.hidden, right.rest)


class _Lazy(Mapping[str, Tensor]):
    """A mapping whose values are made when they are asked for, and not kept."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self.names, self.read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _blocks(module: nn.Module, path: str = "") -> Iterator[str]:
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        if isinstance(module, nn.ModuleList) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield where
        else:
            yield from _blocks(child, where)


def stored_files(folder: Path) -> dict[str, Path]:
    """{tensor name: file} of a folder of safetensors.

    Raises Refused where the weights are in another format, BadFile where the index or a file is broken.
    """
    if (folder / INDEX).is_file():
        try:
            names = json.loads((folder / INDEX).read_text())["weight_map"]
            files = {str(key): folder / Path(name).name for key, name in names.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BadFile(str(folder / INDEX), "is no index of shards", "download or save the model again") from error
        gone = [str(file) for file in files.values() if not file.is_file()]
        if gone:
            raise BadFile(gone[0], "the index names it, and it is not there", "download or save the model again")
        return files
    path = folder / ONE
    if not path.is_file():
        raise Refused(f"streaming {folder}", f"it holds neither {ONE} nor {INDEX}", "save the model as safetensors, or prune in memory (--no-stream)")
    try:
        with safe_open(path, "pt") as file:
            return dict.fromkeys(file.keys(), path)
    except (SafetensorError, OSError) as error:
        raise BadFile(str(path), f"it cannot be read ({error})", "download or save the model again") from error


def load_sharded(spec: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu", task: str = "causal-lm") -> tuple[Loaded, ShardedWeights]:
    """Like `rarefy.hub.load.load`, with the weights left in their files.

    Raises:
        Refused: no local folder of plain safetensors.
        BadFile: weights are missing or truncated.
    """
    kind, target = torch_dtype(dtype), torch_device(device)
    where, _ = resolve(str(spec))
    if not Path(where).is_dir():
        raise Refused(f"streaming {spec}", "the weights are read from a folder on this machine", "download it and name the folder, or prune in memory (--no-stream)")
    files = stored_files(Path(where))
    model = _empty_model(Path(where), files, kind, task)
    model.config._name_or_path = str(spec)
    return Loaded(model, tokenizer_of(where, None), Path(where), str(spec)), ShardedWeights(model, files, target)


def _empty_model(folder: Path, files: Mapping[str, Path], dtype: torch.dtype | None, task: str) -> Any:
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        ours = dict(quantised if isinstance(quantised, Mapping) else quantised.to_dict()).get("quant_method") in (METHOD, NAMED)
        how = f"run rarefy unpack {folder} --out DIR first, and name DIR" if ours else "make it plain first: model.dequantize(), then save_pretrained"
        raise Refused(f"{folder} is {'packed' if ours else 'quantised'}", "only plain weights can be pruned", how)
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, TASKS[task].auto).from_config(config, dtype=dtype or config.dtype or _first_dtype(files))
    if model.dtype == torch.float16 and model._keep_in_fp32_modules:
        raise Refused(f"streaming {type(model).__name__} in float16", "some of its modules stay in float32", "pass --dtype bf16, or prune in memory (--no-stream)")
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    return model.eval()


def _first_dtype(files: Mapping[str, Path]) -> torch.dtype:
    name, path = next(iter(files.items()))
    with safe_open(path, "pt") as file:
        return file.get_tensor(name).dtype


def folder_bytes(spec: str | Path) -> int:
    """Bytes of the weights in a local folder; 0 where `spec` is none."""
    folder = Path(spec).expanduser()
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0


def available_bytes() -> int | None:
    """Memory that this process may take without swapping: what is free, a container's limit, or else what is built in; None if unknown."""
    free = re.search(r"^MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    limit = re.fullmatch(r"\d+", _text("/sys/fs/cgroup/memory.max").strip())
    known = [*([int(free[1]) * 1024] if free else []), *([int(limit[0])] if limit else [])]
    if not known and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        known = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return min(known, default=None)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
