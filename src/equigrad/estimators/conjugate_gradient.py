"""Implicit differentiation by conjugate gradients."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from equigrad.errors import CurvatureError
from equigrad.estimators.estimator import Traits
from equigrad.estimators.implicit import Implicit, Linear, Solution
from equigrad.fields import Count, NotNegative, Positive


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(Implicit):
    r"""Solves `(H + damping I) x = ∂L_out/∂φ` by conjugate gradients (Hestenes, Stiefel 1952).

    Used for meta-learning by Rajeswaran et al. 2019 (iMAML, with a proximal term: a complex synapse
    whose centre is learned). Exact after as many iterations as the Hessian has distinct
    eigenvalues. Needs a positive definite Hessian, which a learner that stopped early may not have.

    Attributes:
        max_iterations: the most Hessian-vector products to take.
        tol: stop when `‖∂L_out/∂φ - (H + damping I) x‖` is at most this share of `‖∂L_out/∂φ‖`.
        damping: number added to every eigenvalue.
        indefinite: what to do in a direction of curvature ≤ 0: `raise` an error, or `stop` with the
            solution so far (Steihaug 1983) and say so in the status.

    Raises:
        CurvatureError: from `meta_gradient`, if a direction has curvature ≤ 0 and `indefinite` is
            `raise`.
    """

    traits: ClassVar[Traits] = Traits(
        idea="implicit, conjugate gradients",
        cost="2K + 3",
        error="vanishes as K → ∞",
        double_backward=True,
        symmetric=True,
        one_system=True,
    )

    remedy: ClassVar[str] = "raise max_iterations, lower damping, or settle longer"

    max_iterations: Count = 100
    tol: Positive = 1e-6
    damping: NotNegative = 0.0
    indefinite: Literal["raise", "stop"] = "raise"

    def solve(self, linear: Linear, pressure: Tensor, notes: list[str]) -> Solution:
        """Conjugate gradients, starting at zero."""
        x, residual = torch.zeros_like(pressure), pressure.clone()
        direction, power = residual.clone(), residual.dot(residual).item()
        size, target = power**0.5, self.tol * power**0.5
        rest = linear.residual()
        unsettled = torch.zeros_like(rest)
        for iteration in range(self.max_iterations):
            if power**0.5 <= target:
                break
            image = linear.product(direction)
            if self.damping:
                image = image + self.damping * direction
            curvature = direction.dot(image).item()
            if not curvature > 0:
                rate = curvature / direction.dot(direction).item()
                if iteration and linear.accuracy and abs(rate) <= linear.accuracy * linear.largest:
                    notes.append(
                        f"conjugate gradients stopped at iteration {iteration}, where the "
                        f"curvature is smaller than the error of products by contrast; residual "
                        f"{power**0.5 / size:.2g} of ∂L_out/∂φ"
                    )
                    return self._solution(x, residual, unsettled, rest)
                met = (
                    f"ConjugateGradient found a direction of non-positive curvature ({rate:.2g}) "
                    f"at iteration {iteration}, so the settled params are not a strict minimum of "
                    f"the inner loss"
                )
                if self.indefinite == "stop":
                    notes.append(f"{met}; the solution of the linear system up to there was used")
                    return (
                        self._solution(x, residual, unsettled, rest)
                        if iteration
                        else Solution(pressure)
                    )
                raise CurvatureError(
                    f"{met}, and the implicit gradient is not defined there. Settle longer, "
                    f"regularise the inner loss, or set damping > 0. For the gradient of training "
                    f"that stops early, use Unrolled()"
                )
            # H⁻¹ r in the same space, since directions are conjugate
            along = direction.dot(rest).item() / curvature
            unsettled.add_(direction, alpha=along)
            rest = rest.sub(image, alpha=along)
            stride = power / curvature
            x.add_(direction, alpha=stride)
            residual.sub_(image, alpha=stride)
            power, before = residual.dot(residual).item(), power
            direction = residual.add(direction, alpha=power / before)
        share = power**0.5 / size if target else 0.0
        if share > self.tol:
            notes.append(
                f"conjugate gradients did not converge: residual {share:.2g} of ∂L_out/∂φ after "
                f"{self.max_iterations} iterations (tol {self.tol:.2g}); raise max_iterations"
            )
        return self._solution(x, residual, unsettled, rest)

    def _solution(self, x: Tensor, residual: Tensor, unsettled: Tensor, rest: Tensor) -> Solution:
        """The solution x with its residual in the system without damping."""
        return Solution(x, residual + self.damping * x, unsettled, rest)
