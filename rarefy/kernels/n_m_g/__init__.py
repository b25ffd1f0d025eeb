"""A linear map by a matrix that stores n of every m columns, every pattern of n in m equally often in a group of rows."""

from rarefy.kernels.n_m_g.op import NofMofGMatrix

__all__ = ["NofMofGMatrix"]
