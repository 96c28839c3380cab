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
    from Arnoldi's iteration with modified Gram-Schmidt, twice. If A is symmetric, the same spaces
    have a part of the step to rest, from which the error is estimated.

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
        rest = linear.residual() if linear.symmetric else None
        unsettled = None if rest is None else torch.zeros_like(pressure)
        while residual.norm().item() > target and left > 0:
            space, closed = _krylov(linear, residual, target, min(self.restart, left))
            step, _ = space.solve(residual)
            before, x, left = residual.norm().item(), x + step, left - space.size
            residual = pressure - linear.product(x)
            if unsettled is not None and rest is not None:
                step, image = space.solve(rest)
                unsettled, rest = unsettled + step, rest - image
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
        return Solution(x, residual, unsettled, rest)


def _refuse_singular(share: float, products: int) -> None:
    """Raise a `CurvatureError` if the remaining residual is more than rounding can explain."""
    if share > UNSOLVED:
        raise CurvatureError(
            f"GMRES broke down after {products} products with a residual of {share:.2g} of its "
            f"right-hand side, because the linear system is singular: at the settled params the "
            f"inner loss has flat directions, or the fixed point of the map is not isolated. "
            f"Regularise the inner loss, or change the map"
        )


@dataclass(frozen=True)
class _Space:
    """A Krylov space, with `A basis[:, :k] = basis @ hessenberg`.

    Attributes:
        basis: k orthonormal columns and, unless the space is closed under A, the next one.
        hessenberg: a matrix with k columns.
    """

    basis: Tensor
    hessenberg: Tensor

    @property
    def size(self) -> int:
        """k, the number of products that it took."""
        return self.hessenberg.shape[1]

    def solve(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """The s in the space that makes `‖right - A s‖` smallest, and `A s`."""
        weights = torch.linalg.pinv(self.hessenberg) @ (self.basis.T @ right)
        return self.basis[:, : self.size] @ weights, self.basis @ (self.hessenberg @ weights)


def _krylov(
    linear: Linear, residual: Tensor, target: float, iterations: int
) -> tuple[_Space, bool]:
    """A space that reduces a residual to the target, and whether it is closed under the matrix."""
    size = residual.norm()
    basis = [residual / size]
    hessenberg = residual.new_zeros(iterations + 1, iterations)
    right = residual.new_zeros(iterations + 1)
    right[0] = size
    largest, eps = 0.0, torch.finfo(residual.dtype).eps
    for k in range(iterations):
        image = linear.product(basis[k])
        largest = max(largest, image.norm().item())
        for i, vector in [*enumerate(basis)] * 2:  # the second time against rounding
            along = vector.dot(image)
            hessenberg[i, k] += along
            image = image - along * vector
        hessenberg[k + 1, k] = image.norm()
        if image.norm().item() <= 10 * eps * largest or k + 1 == linear.size:
            return _Space(torch.stack(basis, dim=1), hessenberg[: k + 1, : k + 1]), True
        basis.append(image / hessenberg[k + 1, k])
        square = hessenberg[: k + 2, : k + 1]
        weights = torch.linalg.pinv(square) @ right[: k + 2]
        if (right[: k + 2] - square @ weights).norm().item() <= target:
            return _Space(torch.stack(basis, dim=1), square), False
    return _Space(torch.stack(basis, dim=1), hessenberg), False
