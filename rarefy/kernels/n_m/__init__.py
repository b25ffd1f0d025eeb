"""A linear map by a matrix that stores n of every m columns."""

from rarefy.kernels.n_m.op import NofMMatrix

__all__ = ["NofMMatrix"]
