"""A linear map by int8 or int4 weights in groups of 32, of which those that are all zero need not be stored."""

from rarefy.kernels.grouped.op import GroupedMatrix

__all__ = ["GroupedMatrix"]
