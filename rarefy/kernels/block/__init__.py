"""A linear map by a matrix of which the blocks that are not all zero are stored; 1 x 1 is compressed sparse rows."""

from rarefy.kernels.block.op import BlockMatrix

__all__ = ["BlockMatrix"]
