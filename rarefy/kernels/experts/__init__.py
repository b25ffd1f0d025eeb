"""What a mixture of experts computes once its rows are routed: sorted by expert, every expert's product, the weighted sum."""

from rarefy.kernels.experts.op import FEW, combine, few, linear, natively, plain, sort

__all__ = ["FEW", "combine", "few", "linear", "natively", "plain", "sort"]
