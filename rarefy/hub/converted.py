"""Tensors that transformers stores otherwise than its classes hold them (a layer's experts apart, say), one at a time both ways."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import lru_cache
from typing import Any

from torch import Tensor

RECENT = 3  # tensors kept while their parts are written: the parts of a layer's experts alternate between them


class Converted:
    """The conversion that transformers itself defines for a class, applied to single tensors.

    Args:
        model: on the meta device.
        stored: names of the tensors in the files.

    `sources` is {state-dict key: [(stored name, pattern of its converter or None)]}.
    """

    def __init__(self, model: Any, stored: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self.model = model
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        self.sources: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        state = model.state_dict()
        for name in sorted(stored, key=dot_natural_key):
            key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            self.sources[key].append((name, pattern))
        model._weight_conversions = [entry for entry in mapping if entry.was_used()]  # as loading leaves it for saving

    def load(self, key: str, stored: Callable[[str], Tensor]) -> Tensor:
        """The tensor that the class holds under `key`, made of its stored parts."""
        name, pattern = self.sources[key][0]
        if pattern is None:
            return stored(name)
        converter: Any = deepcopy(self._by_pattern[pattern])
        for name, part in self.sources[key]:
            converter.add_tensor(key, name, part, stored(name))
        made = converter.convert(key, model=self.model, config=self.model.config)[key]
        return made[0] if isinstance(made, list) else made

    def save(self, state: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
        """What is written for a state dict of meta tensors, by stored name, and what reads it with few tensors in memory."""
        from transformers.core_model_loading import dot_natural_key

        written = {key: self._revert(key, state[key]) for key in sorted(state, key=dot_natural_key)}
        origin = {name: key for key, parts in written.items() for name in parts}
        recent = lru_cache(RECENT)(lambda key: self._revert(key, read(key)))
        return {name: tensor for parts in written.values() for name, tensor in parts.items()}, lambda name: recent(origin[name])[name]

    def _revert(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self.model, {key: tensor}))
