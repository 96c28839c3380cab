"""Implicit differentiation with the whole Hessian: the reference for small problems."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, CurvatureError
from equigrad.estimators.estimator import Traits
from equigrad.estimators.implicit import Implicit
from equigrad.estimators.linearisation import Linearisation
from equigrad.solvers.solver import require


@dataclass(frozen=True, kw_only=True)
class ExactSolve(Implicit):
    r"""Forms the Hessian, column by column, and solves `H x = ∂L_out/∂φ` by factorisation.

    Exact at equilibrium, for invertible Hessians definite or not.

    Attributes:
        max_size: most inner parameters that it will form a matrix for.

    Raises:
        ConfigurationError: from `meta_gradient`, where there are more.
        CurvatureError: from `meta_gradient`, where the Hessian is singular.
    """

    traits: ClassVar[Traits] = Traits(
        idea="implicit, the whole Hessian",
        cost="2 dim φ + 3",
        error="none",
        double_backward=True,
    )

    max_size: int = 2000

    def __post_init__(self) -> None:
        require(self.max_size >= 1, f"max_size must be at least 1, got {self.max_size}")

    def solve(self, linear: Linearisation, pressure: Tensor, notes: list[str]) -> Tensor:
        """Form H and factorise it."""
        if linear.size > self.max_size:
            raise ConfigurationError(
                f"ExactSolve would form a {linear.size} × {linear.size} Hessian, more than "
                f"max_size={self.max_size}; raise it, or use ConjugateGradient()"
            )
        units = torch.eye(linear.size, dtype=pressure.dtype, device=pressure.device)
        hessian = torch.stack([linear.hessian(unit) for unit in units])
        singular = torch.linalg.svdvals(hessian)
        largest, smallest = singular[0].item(), singular[-1].item()
        if not smallest > torch.finfo(pressure.dtype).eps * linear.size * largest:
            raise CurvatureError(
                f"the inner Hessian is singular (singular values from {smallest:.2g} to "
                f"{largest:.2g}): the inner loss has flat directions, and its minimiser is not "
                f"unique. Regularise the inner loss"
            )
        return torch.linalg.solve(hessian, pressure)
