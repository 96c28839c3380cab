"""Phantom gradients: a few damped steps from the settled state, differentiated."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equigrad.estimators.estimator import Estimate, Estimator, Traits
from equigrad.estimators.implicit import noted
from equigrad.estimators.linearisation import Linearisation, SecondDerivatives
from equigrad.estimators.solve_error import Solution, Solved
from equigrad.evaluation import Evaluation
from equigrad.fields import Count, Damping
from equigrad.solvers import Settled, Solver
from equigrad.vectors import finite, flatten


@dataclass(frozen=True, kw_only=True)
class PhantomGradient(Estimator):
    r"""Unrolls k damped steps from the settled state (Geng et al. 2021, unrolled form).

        ∇̂_θ = d/dθ L_out(φ_k(θ), θ),    φ_{t+1} = φ_t - τ r(φ_t, θ) = (1-τ) φ_t + τ F(φ_t, θ)

    where φ_0 is the end of the free phase, held constant, and r is `φ - F(φ, θ)` for a `FixedPoint`
    or `∂L_in/∂φ` for a `Bilevel`. At an exact equilibrium all φ_t are the same, and the result is
    that of `NeumannSeries(terms=k, alpha=τ)`. Elsewhere the steps settle φ further, and are
    themselves differentiated. With one step and τ = 1 this is Jacobian-free backpropagation.

    The `error_estimate` is that of `NeumannSeries` where the steps end: it contains what the series
    leaves out and what the free phase and the steps have left.

    Attributes:
        steps: k; all steps are kept in memory.
        damping: τ in (0, 1].

    Raises:
        ConfigurationError: a value is out of range.
        DoubleBackwardError: from `meta_gradient`, if an operation of the model of an inner loss has
            no second derivative.

    Example:
        >>> PhantomGradient(steps=5, damping=0.5).steps
        5
    """

    traits: ClassVar[Traits] = Traits(
        idea="reverse mode through K further steps",
        cost="2K + 1",
        error="vanishes as K → ∞",
        double_backward=True,
        energy=False,
    )

    steps: Count = 5
    damping: Damping = 0.5

    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle, take the steps, and differentiate the outer loss at their end."""
        free = evaluation.settle(solver)
        evaluation = evaluation.holding(free)
        params = {name: p.detach() for name, p in free.params.items()}
        meta = {name: m.detach().requires_grad_() for name, m in evaluation.meta_params.items()}
        evaluation.stage.stand_at(free)
        leaves, passed = list(meta.values()), list[Tensor]()
        with SecondDerivatives(evaluation, type(self).__name__):
            for step in range(self.steps):
                params = {name: p.requires_grad_() for name, p in params.items()}
                residual = evaluation.residual(params, meta, step)
                moved = zip(params.items(), residual, strict=True)
                params = {name: p - self.damping * r for (name, p), r in moved}
                passed += params.values()
            batches = evaluation.batch_steps("outer")
            losses = [evaluation.evaluate("outer", params, meta, step) for step in batches]
            grads = torch.autograd.grad(
                torch.stack(losses).mean(),
                [*leaves, *passed],
                allow_unused=True,
                materialize_grads=True,
            )
        evaluation.tally.spend(2 * self.steps + len(batches))
        named = dict(zip(meta, grads, strict=False))
        # the forces on the states; at equilibrium, their sum is the series that solves for x
        width = len(params)
        forces = [flatten(list(f)) for f in zip(*[iter(grads[len(leaves) :])] * width, strict=True)]
        forces = [f if torch.finfo(f.dtype).bits >= 32 else f.float() for f in forces]
        x = self.damping * torch.stack(forces).sum(dim=0)
        ended = {name: p.detach() for name, p in params.items()}
        end = dataclasses.replace(free, params=ended, velocity=None)
        return Estimate(
            grads=named,
            phases=(free,),
            judge=lambda: self._error(evaluation, end, forces[-1], x, named),
        )

    def _error(
        self,
        evaluation: Evaluation,
        at: Settled,
        pressure: Tensor,
        x: Tensor,
        grads: dict[str, Tensor],
    ) -> float:
        """The error of the gradient, as that of the series which it is at equilibrium."""
        from equigrad.estimators.rest_error import rest_error  # here: few runs ask for it

        if not finite(pressure):
            return math.nan
        who = type(self).__name__
        linear = Linearisation(evaluation, at, who)
        solved = Solved(linear, Solution(x), pressure, linear.mixed(x), grads)
        found = rest_error(evaluation, at, solved)
        return noted(found, linear, who, "raise steps, or use GMRES()", evaluation.tally.notes)
