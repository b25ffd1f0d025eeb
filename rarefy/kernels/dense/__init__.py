"""A linear map by a dense float32 matrix: the baseline that a sparse one has to beat."""

from rarefy.kernels.dense.op import DenseMatrix

__all__ = ["DenseMatrix"]
