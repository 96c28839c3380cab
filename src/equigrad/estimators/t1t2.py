"""T1-T2: implicit differentiation with the identity in place of the inverse Hessian."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from equigrad.estimators.estimator import Traits
from equigrad.estimators.implicit import Implicit, Linear, Solution
from equigrad.estimators.solve_error import SolveError, scale_error
from equigrad.problems import Params


@dataclass(frozen=True, kw_only=True)
class T1T2(Implicit):
    r"""One mixed second derivative at the settled state (Luketina et al. 2016).

        ∇̂_θ = ∂L_out/∂θ - (∂r/∂θ)ᵀ ∂L_out/∂φ,    r = ∂L_in/∂φ   or   φ - F(φ, θ)

    The inverse Hessian of implicit differentiation is replaced by the identity, and the error this
    makes does not shrink with compute. One product with the Hessian along `∂L_out/∂φ` estimates it
    (`equigrad.estimators.solve_error.scale_error`), by contrast where a model has no second
    derivative. On a `FixedPoint` it is Jacobian-free backpropagation (Fung et al. 2022), a single
    backward through the map. Cheap, but needs a double backward wherever θ acts through the model
    of a loss; `FiniteDifferenceT1T2` does not.

    Raises:
        DoubleBackwardError: from `meta_gradient`, where an operation on the way from θ to the
            gradient has no second derivative (fused attention, a compiled model).
    """

    traits: ClassVar[Traits] = Traits(
        idea="implicit, identity for the inverse",
        cost="3",
        error="does not vanish",
        double_backward=True,
        energy=False,
    )

    remedy: ClassVar[str] = "that is what the identity for the inverse Hessian costs; use GMRES()"

    def solve(self, linear: Linear, pressure: Tensor, notes: list[str]) -> Solution:
        """The pressure itself."""
        return Solution(pressure)

    def judge(
        self,
        linear: Linear,
        solution: Solution,
        pressure: Tensor,
        mixed: Params,
        grads: Params,
    ) -> SolveError:
        """By one product along the pressure."""
        return scale_error(linear, pressure, mixed, grads)
