"""Implicit differentiation with the full matrix, as a reference for small problems."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, CurvatureError
from equigrad.estimators.estimator import Traits
from equigrad.estimators.implicit import Implicit, Linear, Solution
from equigrad.fields import Count


@dataclass(frozen=True, kw_only=True)
class ExactSolve(Implicit):
    r"""Forms `∂r/∂φ`, row by row, and solves `(∂r/∂φ)ᵀ x = ∂L_out/∂φ` by factorisation.

    Exact at equilibrium, for definite and indefinite invertible Hessians, and for maps.

    Attributes:
        max_size: the largest number of inner parameters for which it forms the matrix.

    Raises:
        ConfigurationError: from `meta_gradient`, if there are more.
        CurvatureError: from `meta_gradient`, if the matrix is singular.
    """

    traits: ClassVar[Traits] = Traits(
        idea="implicit, dense linear solve",
        cost="2 dim φ + 3",
        error="none",
        double_backward=True,
        energy=False,
        memory="flat, (dim φ)²",
        one_system=True,
    )

    remedy: ClassVar[str] = (
        "the linear system is ill-conditioned; use torch.float64, or regularise the inner loss"
    )

    max_size: Count = 2000

    def solve(self, linear: Linear, pressure: Tensor, notes: list[str]) -> Solution:
        """Form the matrix and factorise it."""
        if linear.size > self.max_size:
            raise ConfigurationError(
                f"ExactSolve would form a {linear.size} × {linear.size} matrix, more than "
                f"max_size={self.max_size}. Raise max_size, or use GMRES()"
            )
        units = torch.eye(linear.size, dtype=pressure.dtype, device=pressure.device)
        matrix = torch.stack([linear.product(unit) for unit in units])
        singular = torch.linalg.svdvals(matrix)
        largest, smallest = singular[0].item(), singular[-1].item()
        if not smallest > torch.finfo(pressure.dtype).eps * linear.size * largest:
            what = (
                "the inner Hessian is singular ({}): the inner loss has flat directions, so its "
                "minimiser is not unique. Regularise the inner loss"
                if linear.symmetric
                else (
                    "I - ∂F/∂φ is singular ({}) at the settled φ, so the fixed point of the map "
                    "is not isolated. Change the map, for example by adding a decay of φ"
                )
            )
            raise CurvatureError(
                what.format(f"singular values from {smallest:.2g} to {largest:.2g}")
            )
        x = torch.linalg.solve(matrix.T, pressure)
        unsettled = torch.linalg.solve(matrix, linear.residual())
        return Solution(x, pressure - matrix.T @ x, unsettled)
