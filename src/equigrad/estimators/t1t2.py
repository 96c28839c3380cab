"""T1-T2: implicit differentiation with the identity in place of the inverse Hessian."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from equigrad.estimators.estimator import Traits
from equigrad.estimators.implicit import Implicit, Linear, Solution
from equigrad.estimators.solve_error import Solved, SolveError, scale_error
from equigrad.evaluation import Evaluation
from equigrad.solvers import Settled


@dataclass(frozen=True, kw_only=True)
class T1T2(Implicit):
    r"""T1-T2, which takes one mixed second derivative at the settled state (Luketina et al. 2016).

        ∇̂_θ = ∂L_out/∂θ - (∂r/∂θ)ᵀ ∂L_out/∂φ,    r = ∂L_in/∂φ   or   φ - F(φ, θ)

    The identity replaces the inverse Hessian of implicit differentiation. The error of this does
    not shrink with compute; one Hessian product along `∂L_out/∂φ` estimates it
    (`equigrad.estimators.solve_error.scale_error`), by contrast if the model has no second
    derivative. For a `FixedPoint` it is Jacobian-free backpropagation (Fung et al. 2022), a single
    backward pass through the map. It is cheap, but needs a double backward if θ acts through the
    model of a loss; `FiniteDifferenceT1T2` does not.

    Raises:
        DoubleBackwardError: from `meta_gradient`, if an operation on the path from θ to the
            gradient has no second derivative (fused attention, a compiled model).
    """

    traits: ClassVar[Traits] = Traits(
        idea="implicit, identity for the inverse",
        cost="3",
        error="does not vanish",
        double_backward=True,
        energy=False,
    )

    remedy: ClassVar[str] = (
        "this is the error of replacing the inverse Hessian by the identity; use GMRES()"
    )

    def solve(self, linear: Linear, pressure: Tensor, notes: list[str]) -> Solution:
        """The right-hand side itself."""
        return Solution(pressure)

    def judge(self, evaluation: Evaluation, free: Settled, solved: Solved) -> SolveError:
        """By one product along the pressure."""
        return scale_error(solved)
