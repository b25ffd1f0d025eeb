"""GQSA: int4 in groups, whole groups missing; first the weights learn block by block, then the scales alone, end to end."""

from __future__ import annotations

from rarefy.core.records import Recipe
from rarefy.weights.allocations.uniform import Uniform
from rarefy.weights.criteria.inverse_hessian import InverseHessian
from rarefy.weights.patterns.structured import RowBlock
from rarefy.weights.solvers.least_squares import LeastSquares

GQSA = Recipe("gqsa", LeastSquares(InverseHessian(power=2)), Uniform(), RowBlock(1, 32))
