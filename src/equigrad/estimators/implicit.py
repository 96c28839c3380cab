"""Implicit differentiation: one linear system with the inner Hessian."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from equigrad.errors import DoubleBackwardError
from equigrad.estimators.contrast_products import ContrastProducts
from equigrad.estimators.estimator import Estimate, Estimator
from equigrad.estimators.linearisation import Linearisation
from equigrad.evaluation import Evaluation
from equigrad.fields import require
from equigrad.solvers import Settled, Solver
from equigrad.vectors import flatten

Linear = Linearisation | ContrastProducts
"""Products with the derivatives of the residual, however they are had."""


@dataclass(frozen=True, kw_only=True)
class Implicit(Estimator):
    r"""The implicit function theorem at the settled state.

        ∇_θ = ∂L_out/∂θ - (∂r/∂θ)ᵀ x,    (∂r/∂φ)ᵀ x = ∂L_out/∂φ

    where r is the residual: `∂L_in/∂φ` of a `Bilevel`, so that `∂r/∂φ` is the Hessian H, and
    `φ - F(φ, θ)` of a `FixedPoint`. The estimators of this family differ in how they solve for x
    alone.

    Attributes:
        products: how products with H and with the mixed derivative are had. `autograd`
            differentiates the inner gradient once more. `contrast` takes differences of two inner
            gradients on both sides of the settled state, so that everything is of first order, and
            says in the status how accurate they are; float32 allows about three digits, float64
            eight. `auto` is `autograd`, and `contrast` where the model has no second derivative.
            A map's products are a single backward through it, and never by contrast.
    """

    products: Literal["auto", "autograd", "contrast"] = "auto"

    @abstractmethod
    def solve(self, linear: Linear, pressure: Tensor, notes: list[str]) -> Tensor:
        """Solve `(∂r/∂φ)ᵀ x = pressure`.

        Args:
            linear: products with `(∂r/∂φ)ᵀ`, the Hessian where there is an inner loss.
            pressure: `∂L_out/∂φ`, a flat vector.
            notes: the place for what the user should know about the solution.

        Returns:
            x, a flat vector.
        """

    def check(self, evaluation: Evaluation, solver: Solver) -> None:
        """Refuse products by contrast where there is no Hessian."""
        super().check(evaluation, solver)
        what = type(evaluation.problem).__name__
        require(
            self.products != "contrast" or evaluation.problem.symmetric,
            f"products='contrast' are those of a Hessian, and a {what} has none; its products by "
            f"autograd are a single backward: leave products='auto'",
        )

    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle, solve the linear system, and take the mixed derivative along its solution."""
        free = evaluation.settle(solver)
        pressure, direct = evaluation.outer_gradients(free)
        mixed = self._mixed(evaluation, free, flatten(list(pressure.values())))
        grads = {name: direct[name] - mixed[name] for name in direct}
        return Estimate(grads=grads, phases=(free,))

    def _mixed(self, evaluation: Evaluation, free: Settled, pressure: Tensor) -> dict[str, Tensor]:
        """`(∂r/∂θ)ᵀ x`, by autograd or by contrast."""
        if self.products != "contrast":
            notes: list[str] = []
            linear = Linearisation(evaluation, free, type(self).__name__)
            try:
                mixed = linear.mixed(self.solve(linear, pressure, notes))
            except DoubleBackwardError:
                if self.products == "autograd" or not evaluation.problem.symmetric:
                    raise
            else:
                evaluation.tally.note(*notes)
                return mixed
        contrast, notes = ContrastProducts(evaluation, free), []
        mixed = contrast.mixed(self.solve(contrast, pressure, notes))
        evaluation.tally.note(
            *notes,
            f"products by contrast, accurate to {contrast.accuracy:.1g} at a distance of "
            f"{contrast.distance or 0:.1g}",
        )
        return mixed
