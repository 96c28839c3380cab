"""Implicit differentiation: one linear system with the inner Hessian."""

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from equigrad.estimators.estimator import Estimate, Estimator
from equigrad.estimators.linearisation import Linearisation, flatten
from equigrad.evaluation import Evaluation
from equigrad.solvers import Solver


@dataclass(frozen=True, kw_only=True)
class Implicit(Estimator):
    r"""The implicit function theorem at the settled state.

        ∇_θ = ∂L_out/∂θ - (∂r/∂θ)ᵀ x,    (∂r/∂φ)ᵀ x = ∂L_out/∂φ

    where r is the residual: `∂L_in/∂φ` of a `Bilevel`, so that `∂r/∂φ` is the Hessian H, and
    `φ - F(φ, θ)` of a `FixedPoint`. The estimators of this family differ in how they solve for x
    alone.
    """

    @abstractmethod
    def solve(self, linear: Linearisation, pressure: Tensor, notes: list[str]) -> Tensor:
        """Solve `(∂r/∂φ)ᵀ x = pressure`.

        Args:
            linear: products with `(∂r/∂φ)ᵀ`, the Hessian where there is an inner loss.
            pressure: `∂L_out/∂φ`, a flat vector.
            notes: the place for what the user should know about the solution.

        Returns:
            x, a flat vector.
        """

    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle, solve the linear system, and take the mixed derivative along its solution."""
        free = evaluation.settle(solver)
        pressure, direct = evaluation.outer_gradients(free)
        linear = Linearisation(evaluation, free, type(self).__name__)
        response = self.solve(linear, flatten(list(pressure.values())), evaluation.notes)
        mixed = linear.mixed(response)
        grads = {name: direct[name] - mixed[name] for name in direct}
        return Estimate(grads=grads, phases=(free,))
