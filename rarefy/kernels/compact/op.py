"""The operation that layers call: the small dense product between a selection of x and a place in y."""

from __future__ import annotations

from torch import Tensor

from rarefy.core.errors import BadFile
from rarefy.kernels.compact import reference
from rarefy.kernels.dense import DenseMatrix


class CompactMatrix:
    """A matrix [O, I] that is zero outside the rows bool [O] and columns bool [I]: values [rows kept, columns kept].

    Raises:
        BadFile: the masks do not account for the values.

    >>> import torch
    >>> m = CompactMatrix(torch.tensor([True, False]), torch.tensor([False, True, True]), torch.tensor([[2.0, 3.0]]))
    >>> m.linear(torch.tensor([[1.0, 10.0, 100.0]]), torch.tensor([0.0, 5.0])).tolist(), m.dense().tolist()
    ([[320.0, 5.0]], [[0.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    """

    def __init__(self, rows: Tensor, columns: Tensor, values: Tensor) -> None:
        if values.shape != (int(rows.sum()), int(columns.sum())):
            raise BadFile("a compacted matrix", f"{int(rows.sum())} rows and {int(columns.sum())} columns are kept, it holds {tuple(values.shape)}", "write the file again")
        self.kept_rows, self.kept_columns, self.inner = rows, columns, DenseMatrix(values)
        self.row, self.column = (None if bool(kept.all()) else kept.nonzero()[:, 0] for kept in (rows, columns))
        self.rows, self.columns, self.fast = rows.numel(), columns.numel(), self.inner.fast

    def dense(self) -> Tensor:
        """The matrix [O, I]."""
        return reference.unpack(self.kept_rows, self.kept_columns, self.inner.weight)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``y = x W^T + b``: x [..., I] -> y [..., O]; a removed column of x is not read, a removed row is its bias."""
        taken = x if self.column is None else x.index_select(-1, self.column)
        if self.row is None:
            return self.inner.linear(taken, bias)
        y = x.new_zeros(*x.shape[:-1], self.rows).index_copy(-1, self.row, self.inner.linear(taken))
        return y if bias is None else y + bias

    kind = "compact"

    def arguments(self) -> tuple[int, ...]:
        """What the native side takes the small dense matrix by; `row` and `column` say where it lies."""
        return self.inner.arguments()
