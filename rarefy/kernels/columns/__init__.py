"""A linear map by weights stored column by column: what a zero of x multiplies is never read."""

from rarefy.kernels.columns.op import ColumnsMatrix

__all__ = ["ColumnsMatrix"]
