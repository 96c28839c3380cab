"""Implicit differentiation: one linear system with the inner Hessian."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.estimators.estimator import Estimate, Estimator
from equigrad.estimators.linearisation import Linearisation, flatten
from equigrad.evaluation import Evaluation
from equigrad.problems import Params
from equigrad.solvers import Solver, TorchOptimizer


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

    def check(self, evaluation: Evaluation, solver: Solver) -> None:
        """Also refuse an optimiser whose weight decay moves what settles from the residual's zero.

        Raises:
            ConfigurationError: a `TorchOptimizer` adds weight decay to the gradient.
        """
        super().check(evaluation, solver)
        decay, beside = solver.decay() if isinstance(solver, TorchOptimizer) else (0.0, False)
        if not decay or not isinstance(solver, TorchOptimizer):
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
        evaluation.notes.append(f"{what} (set weight_decay=0, and put the decay into the loss)")

    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle, solve the linear system, and take the mixed derivative along its solution."""
        free = evaluation.settle(solver)
        pressure, direct = evaluation.outer_gradients(free)
        linear = Linearisation(evaluation, free, type(self).__name__)
        response = self.solve(linear, _widened(pressure, evaluation.notes), evaluation.notes)
        mixed = linear.mixed(response)
        grads = {name: direct[name] - mixed[name].to(direct[name].dtype) for name in direct}
        return Estimate(grads=grads, phases=(free,))


def _widened(pressure: Params, notes: list[str]) -> Tensor:
    """A flat vector in a precision that linear algebra has: float32 in place of 16 bits."""
    vector = flatten(list(pressure.values()))
    precision = torch.finfo(vector.dtype)
    if precision.bits >= 32:
        return vector
    notes.append(
        f"params are {vector.dtype}: products with ∂r/∂φ have a relative error of about "
        f"{precision.eps:.1g}, which the solution multiplies by the condition number; settle in "
        f"float32 for more precision"
    )
    return vector.float()
