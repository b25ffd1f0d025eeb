"""A linear map by a matrix from which whole rows and columns are removed."""

from rarefy.kernels.compact.op import CompactMatrix

__all__ = ["CompactMatrix"]
