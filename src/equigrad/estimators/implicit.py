"""Implicit differentiation: one linear system with the inner Hessian."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, DoubleBackwardError
from equigrad.estimators.contrast_products import ContrastProducts
from equigrad.estimators.estimator import Estimate, Estimator
from equigrad.estimators.linearisation import Linearisation
from equigrad.estimators.solve_error import Linear, Solution, SolveError, solve_error
from equigrad.evaluation import Evaluation
from equigrad.fields import require
from equigrad.problems import Params
from equigrad.solvers import Settled, Solver, TorchOptimizer
from equigrad.vectors import flatten

POOR = 1e-2
"""An estimated relative error above this is named in the status."""


@dataclass(frozen=True, kw_only=True)
class Implicit(Estimator):
    r"""The implicit function theorem at the settled state.

        ∇_θ = ∂L_out/∂θ - (∂r/∂θ)ᵀ x,    (∂r/∂φ)ᵀ x = ∂L_out/∂φ

    where r is the residual: `∂L_in/∂φ` of a `Bilevel`, so that `∂r/∂φ` is the Hessian H, and
    `φ - F(φ, θ)` of a `FixedPoint`. The estimators of this family differ in how they solve for x
    alone.

    What their solution leaves of the system gives an `error_estimate` of the gradient, which the
    status names where it is above 1e-2 (`equigrad.estimators.solve_error`). It takes one product
    where little is left, and up to eight elsewhere. What a free phase that has not settled adds is
    not in it.

    Attributes:
        products: how products with H and with the mixed derivative are had. `autograd`
            differentiates the inner gradient once more. `contrast` takes differences of two inner
            gradients on both sides of the settled state, so that everything is of first order, and
            says in the status how accurate they are; float32 allows about three digits, float64
            eight. `auto` is `autograd`, and `contrast` where the model has no second derivative.
            A map's products are a single backward through it, and never by contrast.
    """

    remedy: ClassVar[str] = "use GMRES() with more iterations"
    """What to do about a poor solution; a sentence is built around it."""

    products: Literal["auto", "autograd", "contrast"] = "auto"

    @abstractmethod
    def solve(self, linear: Linear, pressure: Tensor, notes: list[str]) -> Solution:
        """Solve `(∂r/∂φ)ᵀ x = pressure`.

        Args:
            linear: products with `(∂r/∂φ)ᵀ`, the Hessian where there is an inner loss.
            pressure: `∂L_out/∂φ`, a flat vector.
            notes: the place for what the user should know about the solution.

        Returns:
            x, and what it leaves of the system.
        """

    @property
    def differentiates_twice(self) -> bool:
        """Not by contrast."""
        return super().differentiates_twice and self.products != "contrast"

    def check(self, evaluation: Evaluation, solver: Solver) -> None:
        """Also refuse what settles elsewhere than the residual says, and contrast of a map.

        Raises:
            ConfigurationError: a `TorchOptimizer` adds weight decay to the gradient, or products
                are to be had by contrast where there is no Hessian.
        """
        super().check(evaluation, solver)
        what = type(evaluation.problem).__name__
        require(
            self.products != "contrast" or evaluation.problem.symmetric,
            f"products='contrast' are those of a Hessian, and a {what} has none; its products by "
            f"autograd are a single backward: leave products='auto'",
        )
        if isinstance(solver, TorchOptimizer):
            self._check_decay(evaluation, solver)

    def _check_decay(self, evaluation: Evaluation, solver: TorchOptimizer) -> None:
        decay, beside = solver.decay()
        if not decay:
            return
        what = (
            f"{solver.optimizer.__name__} has weight_decay={decay:g}, which is not in the inner "
            f"loss: what settles is not where its gradient vanishes, and {type(self).__name__} "
            f"differentiates that"
        )
        mend = (
            f"Set weight_decay=0 and add {decay / 2:g} * sum(p.square().sum() for p in "
            f"params.values()) to the inner loss"
        )
        if not beside:
            raise ConfigurationError(f"{what}. {mend}, or use Contrastive()")
        evaluation.tally.note(f"{what} (set weight_decay=0, and put the decay into the loss)")

    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle, solve the linear system, and take the mixed derivative along its solution."""
        free = evaluation.settle(solver)
        pressure, direct = evaluation.outer_gradients(free)
        flat = flatten(list(pressure.values()))
        flat = flat if torch.finfo(flat.dtype).bits >= 32 else flat.float()
        solved, mixed = self._mixed(evaluation, free, flat)
        grads = {name: direct[name] - mixed[name].to(direct[name].dtype) for name in direct}
        if solved is None:
            return Estimate(grads=grads, phases=(free,))
        linear, solution = solved
        notes = evaluation.tally.notes

        def judge() -> float:
            try:
                found = self.judge(linear, solution, flat, mixed, grads)
            except DoubleBackwardError:  # only one that a regulariser spared so far
                contrast = ContrastProducts(evaluation, free)
                found = self.judge(contrast, solution, flat, mixed, grads)
            return self._error(linear, found, notes)

        return Estimate(grads=grads, phases=(free,), judge=judge)

    def judge(
        self,
        linear: Linear,
        solution: Solution,
        pressure: Tensor,
        mixed: Params,
        grads: Params,
    ) -> SolveError:
        """How wrong the gradient is, from what the solution leaves of the system.

        Args:
            linear: products.
            solution: of the system.
            pressure: its right-hand side.
            mixed: the mixed derivative along the solution.
            grads: the gradient.
        """
        return solve_error(linear, solution, pressure, mixed, grads)

    def _mixed(
        self, evaluation: Evaluation, free: Settled, pressure: Tensor
    ) -> tuple[tuple[Linear, Solution] | None, dict[str, Tensor]]:
        """What was solved, and `(∂r/∂θ)ᵀ x`; by autograd or by contrast."""
        linear = Linearisation(evaluation, free, type(self).__name__)
        if not torch.isfinite(pressure).all():  # nothing to solve, and no number to pretend
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
            f"products by contrast, accurate to {contrast.accuracy:.1g} at a distance of "
            f"{contrast.distance or 0:.1g}",
        )
        return (contrast, solution), mixed

    def _error(self, linear: Linear, found: SolveError, notes: list[str]) -> float:
        """The whole relative error, with a note of a poor one."""
        error = linear.accuracy + found.relative
        if (precision := torch.finfo(linear.leaves[0].dtype)).bits < 32:
            error = max(error, precision.eps)
            notes.append(
                f"params are {linear.leaves[0].dtype}: products with ∂r/∂φ have a relative error "
                f"of about {precision.eps:.1g}, which the solution multiplies by the condition "
                f"number; settle in float32 for more precision"
            )
        if error > POOR:
            notes.append(found.sentence(type(self).__name__, error, self.remedy))
        return error
