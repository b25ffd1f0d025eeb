"""Where the tensors of a model are while it is pruned: the once-flow asks here before it reads, runs or writes a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from rarefy.core.errors import BadInput
from rarefy.core.records import Site
from rarefy.weights.blocks import Calls, capture
from rarefy.weights.checkpoint import Checkpoint


class Weights:
    """A model whose tensors are in memory all the time; `rarefy.hub.shards.ShardedWeights` reads them when they are needed.

    Raises BadInput where a tensor is on the meta device: it has no values.

    >>> weights = Weights(nn.Linear(2, 1))
    >>> with weights.hold([""]):
    ...     sorted(weights.tensors())
    ['bias', 'weight']
    """

    streamed = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        empty = [] if self.streamed else [name for name, tensor in model.named_parameters() if tensor.is_meta]
        if empty:
            raise BadInput(f"a {type(model).__name__} with {empty[0]} on the meta device", "it holds no weights that could be pruned", "load it, or prune a folder with --stream")

    def tensors(self) -> Mapping[str, Tensor]:
        """Every parameter and buffer as it is now, by name; shared ones once."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def hold(self, modules: Iterable[str]) -> AbstractContextManager[Any]:
        """While it is entered, the tensors of these modules and all below them are in memory and may be read and written."""
        return nullcontext()

    def watched(self) -> AbstractContextManager[Any]:
        """While it is entered, the model may be called."""
        return nullcontext()

    def capture(self, chain: Sequence[tuple[str, nn.Module]], batches: Sequence[Any]) -> list[Calls]:
        """What the first block and every block are called with, see `rarefy.weights.blocks.capture`."""
        return capture(self.model, chain, batches)

    def finished(self, sites: Iterable[Site], checkpoint: Checkpoint | None) -> None:
        """These sites have their final values, and a group of the checkpoint holds them."""
