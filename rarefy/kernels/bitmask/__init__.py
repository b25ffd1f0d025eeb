"""A linear map by a matrix that is stored as a bit mask and its kept values."""

from rarefy.kernels.bitmask.op import BitmaskMatrix

__all__ = ["BitmaskMatrix"]
