"""Implicit differentiation by GMRES."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equigrad.errors import CurvatureError
from equigrad.estimators.estimator import Traits
from equigrad.estimators.implicit import Implicit, Linear, Solution
from equigrad.fields import Count, Positive

UNSOLVED = 1e-2
"""A system is singular if no further product reduces its residual below this share."""


@dataclass(frozen=True, kw_only=True)
class GMRES(Implicit):
    r"""Solves `(∂r/∂φ)ᵀ x = ∂L_out/∂φ` by restarted GMRES (Saad, Schultz 1986).

        x_k = argmin ‖g - A x‖  over  x ∈ x_0 + span{r_0, A r_0, …, A^{k-1} r_0},  r_0 = g - A x_0

    It works for any invertible matrix A, symmetric or not, definite or not, and is exact after as
    many iterations as A has distinct eigenvalues, if it does not restart before. The basis comes
    from Arnoldi's iteration with modified Gram-Schmidt.

    Attributes:
        max_iterations: the most products to take, over all restarts.
        restart: number of basis vectors after which the iteration restarts at its current x.
        tol: stop when `‖g - A x‖` is at most this share of `‖g‖`.

    Raises:
        CurvatureError: from `meta_gradient`, if the matrix is singular.

    Example:
        >>> from equigrad.testing import Quadratic
        >>> import equigrad as eg
        >>> q = Quadratic(dim=10)
        >>> result = eg.meta_gradient(
        ...     q.problem, q.params(), q.meta_params(), solver=q.solver(1000), estimator=GMRES()
        ... )
        >>> q.relative_error(result.grads["theta"]) < 1e-5
        True
    """

    traits: ClassVar[Traits] = Traits(
        idea="implicit, GMRES",
        cost="2K + 3",
        error="vanishes as K → ∞",
        double_backward=True,
        energy=False,
        one_system=True,
    )

    max_iterations: Count = 100
    restart: Count = 30
    tol: Positive = 1e-6

    def solve(self, linear: Linear, pressure: Tensor, notes: list[str]) -> Solution:
        """Run cycles, starting at zero, each for the residual of the last one."""
        x, left, residual = torch.zeros_like(pressure), self.max_iterations, pressure
        target = self.tol * pressure.norm().item()
        while residual.norm().item() > target and left > 0:
            step, taken, closed = _cycle(linear, residual, target, min(self.restart, left))
            before, x, left = residual.norm().item(), x + step, left - taken
            residual = pressure - linear.product(x)
            if closed and residual.norm().item() > 0.5 * before:  # nothing left to find
                share = (residual.norm() / pressure.norm()).item()
                _refuse_singular(share, self.max_iterations - left)
                break
        share = (residual.norm() / pressure.norm()).item() if target else 0.0
        if share > 2 * self.tol:  # one part for the tolerance, one for rounding
            notes.append(
                f"GMRES did not converge: residual {share:.2g} of ∂L_out/∂φ after "
                f"{self.max_iterations - left} iterations (tol {self.tol:.2g}); raise "
                f"max_iterations or restart"
            )
        return Solution(x, residual)


def _refuse_singular(share: float, products: int) -> None:
    """Raise a `CurvatureError` if the remaining residual is more than rounding can explain."""
    if share > UNSOLVED:
        raise CurvatureError(
            f"GMRES broke down after {products} products with a residual of {share:.2g} of its "
            f"right-hand side, because the linear system is singular: at the settled params the "
            f"inner loss has flat directions, or the fixed point of the map is not isolated. "
            f"Regularise the inner loss, or change the map"
        )


def _cycle(
    linear: Linear, residual: Tensor, target: float, iterations: int
) -> tuple[Tensor, int, bool]:
    """The correction in a Krylov space that makes the residual smallest.

    Returns:
        The correction, the number of products, and whether the space is closed under the matrix.
    """
    size = residual.norm()
    basis = [residual / size]
    # A basis[:k] = basis[:k+1] hessenberg[:k+1, :k]
    hessenberg = residual.new_zeros(iterations + 1, iterations)
    right = residual.new_zeros(iterations + 1)
    right[0] = size
    weights, largest, closed = right[:0], 0.0, False
    eps = torch.finfo(residual.dtype).eps
    for k in range(iterations):
        image = linear.product(basis[k])
        largest = max(largest, image.norm().item())
        for i, vector in enumerate(basis):
            hessenberg[i, k] = vector.dot(image)
            image = image - hessenberg[i, k] * vector
        hessenberg[k + 1, k] = image.norm()
        square = hessenberg[: k + 2, : k + 1]
        weights = torch.linalg.pinv(square) @ right[: k + 2]
        short = (right[: k + 2] - square @ weights).norm().item()
        closed = image.norm().item() <= 10 * eps * largest or k + 1 == linear.size
        if closed or short <= target:
            break
        basis.append(image / hessenberg[k + 1, k])
    step = torch.stack(basis[: len(weights)], dim=1) @ weights
    return step, len(weights), closed
