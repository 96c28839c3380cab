"""Implicit differentiation: the hypergradient from one linear system at the settled state."""

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, DoubleBackwardError
from equigrad.estimators.contrast_products import ContrastProducts
from equigrad.estimators.estimator import Estimate, Estimator
from equigrad.estimators.linearisation import Linearisation
from equigrad.estimators.solve_error import Linear, Solution, Solved, SolveError
from equigrad.evaluation import Evaluation
from equigrad.fields import require
from equigrad.solvers import Settled, Solver
from equigrad.vectors import finite, flatten

POOR = 1e-2
"""An estimated relative error above this is reported in the status."""


@dataclass(frozen=True, kw_only=True)
class Implicit(Estimator):
    r"""The implicit function theorem at the settled state.

        ∇_θ = ∂L_out/∂θ - (∂r/∂θ)ᵀ x,    (∂r/∂φ)ᵀ x = ∂L_out/∂φ

    where r is the residual: `∂L_in/∂φ` for a `Bilevel`, so that `∂r/∂φ` is the Hessian H, and
    `φ - F(φ, θ)` for a `FixedPoint`. The estimators of this family differ only in how they solve
    for x.

    The residual of the linear system gives an `error_estimate` of the gradient, which the status
    reports above 1e-2. It is taken where the free phase would have come to rest by the same
    linear model, so that what it left is included (`equigrad.estimators.rest_error`). This takes
    about eleven gradients if the residuals are small, and 25 to 50 otherwise.

    Attributes:
        products: how to compute products with H and with the mixed derivative. `autograd`
            differentiates the inner gradient. `contrast` takes differences of two inner gradients
            on both sides of the settled state, which are of first order, and reports their accuracy
            in the status: about three digits in float32, eight in float64. `auto` is `autograd`, or
            `contrast` if the model has no second derivative. Products of a map always take a single
            backward pass through it.
    """

    remedy: ClassVar[str] = "use GMRES() with more iterations"
    """Advice for a poor solution, as part of a sentence."""

    products: Literal["auto", "autograd", "contrast"] = "auto"

    @abstractmethod
    def solve(self, linear: Linear, pressure: Tensor, notes: list[str]) -> Solution:
        """Solve `(∂r/∂φ)ᵀ x = pressure`.

        Args:
            linear: products with `(∂r/∂φ)ᵀ`, the Hessian if there is an inner loss.
            pressure: the right-hand side `∂L_out/∂φ`, a flat vector.
            notes: list to which remarks for the user are added.

        Returns:
            x and its residual.
        """

    @property
    def differentiates_twice(self) -> bool:
        """True unless products are by contrast."""
        return super().differentiates_twice and self.products != "contrast"

    def check(self, evaluation: Evaluation, solver: Solver) -> None:
        """Also refuse solvers that do not settle at a zero of the residual, and contrast of a map.

        Raises:
            ConfigurationError: a `TorchOptimizer` adds weight decay to the gradient, or products
                should be by contrast but there is no Hessian.
        """
        super().check(evaluation, solver)
        what = type(evaluation.problem).__name__
        require(
            self.products != "contrast" or evaluation.problem.symmetric,
            f"products='contrast' needs a Hessian, and a {what} problem has none. Its products by "
            f"autograd need a single backward pass: use products='auto'",
        )
        self._check_decay(evaluation, solver)

    def _check_decay(self, evaluation: Evaluation, solver: Solver) -> None:
        decay, beside = solver.decay()
        if not decay:
            return
        name = getattr(solver, "optimizer", type(solver)).__name__
        what = (
            f"{name} has weight_decay={decay:g}, which is not in the inner "
            f"loss, so the settled params are not its minimum, as {type(self).__name__} assumes"
        )
        mend = (
            f"Set weight_decay=0 and add {decay / 2:g} * sum(p.square().sum() for p in "
            f"params.values()) to the inner loss"
        )
        if not beside:
            raise ConfigurationError(f"{what}. {mend}, or use Contrastive()")
        evaluation.tally.note(f"{what} (set weight_decay=0, and add the decay to the inner loss)")

    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle, solve the linear system, and take the mixed derivative along its solution."""
        free = evaluation.settle(solver)
        pressure, direct = evaluation.outer_gradients(free)
        flat = flatten(list(pressure.values()))
        flat = flat if torch.finfo(flat.dtype).bits >= 32 else flat.float()
        system, mixed = self._mixed(evaluation, free, flat)
        grads = {name: direct[name] - mixed[name].to(direct[name].dtype) for name in direct}
        if system is None:
            return Estimate(grads=grads, phases=(free,))
        solved = Solved(*system, flat, mixed, grads)
        notes = evaluation.tally.notes

        def judge() -> float:
            try:
                found = self.judge(evaluation, free, solved)
            except DoubleBackwardError:  # only one that a regulariser spared so far
                contrast = ContrastProducts(evaluation, free)
                found = self.judge(evaluation, free, dataclasses.replace(solved, linear=contrast))
            return noted(found, solved.linear, type(self).__name__, self.remedy, notes)

        return Estimate(grads=grads, phases=(free,), judge=judge)

    def judge(self, evaluation: Evaluation, free: Settled, solved: Solved) -> SolveError:
        """The error of the gradient, estimated from the residuals of the system and of the phase.

        Args:
            evaluation: evaluates the losses.
            free: the end of the free phase.
            solved: the system, its solution and the gradient.
        """
        from equigrad.estimators.rest_error import rest_error  # here: few runs ask for it

        return rest_error(evaluation, free, solved)

    def _mixed(
        self, evaluation: Evaluation, free: Settled, pressure: Tensor
    ) -> tuple[tuple[Linear, Solution] | None, dict[str, Tensor]]:
        """The solution, and `(∂r/∂θ)ᵀ x`, by autograd or by contrast."""
        linear = Linearisation(evaluation, free, type(self).__name__)
        if not finite(pressure):  # no solution: let NaN show
            return None, linear.mixed(torch.full_like(pressure, torch.nan))
        if self.products != "contrast":
            notes: list[str] = []
            try:
                solution = self.solve(linear, pressure, notes)
                mixed = linear.mixed(solution.x)
            except DoubleBackwardError:
                if self.products == "autograd" or not evaluation.problem.symmetric:
                    raise
            else:
                evaluation.tally.note(*notes)
                return (linear, solution), mixed
        contrast, notes = ContrastProducts(evaluation, free), []
        solution = self.solve(contrast, pressure, notes)
        mixed = contrast.mixed(solution.x)
        evaluation.tally.note(
            *notes,
            f"products by contrast (differences of gradients) accurate to "
            f"{contrast.accuracy:.1g} over a distance of {contrast.distance or 0:.1g}",
        )
        return (contrast, solution), mixed


def noted(found: SolveError, linear: Linear, who: str, remedy: str, notes: list[str]) -> float:
    """The relative error of a gradient, with a note if it is large.

    Args:
        found: the error by the residuals of the linear system and of the phase.
        linear: the products that were used.
        who: the estimator's name.
        remedy: advice for a poor solution, as part of a sentence.
        notes: list to which remarks for the user are added.
    """
    error = linear.accuracy + found.relative
    if (precision := torch.finfo(linear.leaves[0].dtype)).bits < 32:
        error = max(error, precision.eps)
        notes.append(
            f"params are {linear.leaves[0].dtype}, so products with ∂r/∂φ have a relative "
            f"error of about {precision.eps:.1g}, and the solution has this error times the "
            f"condition number; use float32 for a more precise gradient"
        )
    if error > POOR:
        notes.append(found.sentence(who, error, remedy))
    return error
