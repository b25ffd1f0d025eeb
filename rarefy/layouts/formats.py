"""What becomes of a tensor that an operator makes: selected inside the operator, laid down, selected again, laid down for good."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

import rarefy.layouts as _layouts
from rarefy.core.discover import pick
from rarefy.core.errors import BadInput
from rarefy.core.records import Paper
from rarefy.core.roles import Selection
from rarefy.layouts.registry import DENSE, STEN, name_of
from rarefy.layouts.selections import MATERIALISING, All, Same
from rarefy.layouts.tensor import convert, run


@dataclass(frozen=True)
class Format:
    """The inline selection and the layout that the operator writes; the external selection and the layout that stays.

    Raises:
        BadInput: an inline selection that needs the whole tensor, or an unknown layout.

    >>> import torch
    >>> from rarefy.layouts.selections import Largest
    >>> Format(external=Largest(0.5), layout="csr").of(torch.tensor([[1.0, -3.0]])).tolist()
    [[0.0, -3.0]]
    """

    paper: ClassVar[Paper] = STEN

    inline: Selection = field(default_factory=All)
    temporary: str = DENSE
    external: Selection = field(default_factory=All)
    layout: str = DENSE

    def __post_init__(self) -> None:
        if self.inline.passes == MATERIALISING:
            raise BadInput(f"inline selection {self.inline!r}", "inside an operator only a part of its result is there, and it needs the whole", "make it the external one")
        for name in (self.temporary, self.layout):
            if name != DENSE:
                pick(_layouts.LAYOUTS, name, "layout")

    @property
    def derives(self) -> bool:
        """Whether a gradient in this format is the derivative of what the forward computed."""
        return self == GRADIENT

    def call(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, gradient: Format | None = None, dense: Callable[..., Any] | None = None) -> Any:
        """`op(*args, **kwargs)` in this format.

        Args:
            gradient: the format of the gradient of what is returned; None lets through what the forward kept, which is
                the derivative of what was computed.
            dense: what computes it densely, where that is not `op` itself.
        """
        made = run(op, args, kwargs or {}, keep=self.inline, into=self.temporary, call=dense)
        if not isinstance(made, Tensor):
            raise BadInput(f"{name_of(op)}, which returns a {type(made).__name__}", "a format is for one tensor", "set it on the module that makes that tensor")
        return convert(made, self.external, self.layout, GRADIENT if gradient is None else gradient, selected=type(self.inline) is not All)

    def of(self, values: Tensor, kept: Tensor | None = None) -> Tensor:
        """A tensor as this format leaves it, dense again: what stays of a gradient, which autograd sums as a dense tensor."""
        laid = convert(values.detach(), self.inline, self.temporary, kept=kept)
        found: Tensor = convert(convert(laid, self.external, self.layout, kept=kept), All(), DENSE)
        return found


GRADIENT = Format(external=Same())  # what the forward kept
