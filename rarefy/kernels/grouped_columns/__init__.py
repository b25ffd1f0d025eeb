"""A linear map by int8 or int4 weights in groups of 32, stored column by column: what a zero of x multiplies is never read."""

from rarefy.kernels.grouped_columns.op import GroupedColumnsMatrix

__all__ = ["GroupedColumnsMatrix"]
