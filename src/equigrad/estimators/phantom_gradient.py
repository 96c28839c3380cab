"""Phantom gradients: a few damped steps from the settled state, differentiated."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from equigrad.estimators.estimator import Estimate, Estimator, Traits
from equigrad.estimators.linearisation import SecondDerivatives
from equigrad.evaluation import Evaluation
from equigrad.fields import Count, Damping
from equigrad.solvers import Solver


@dataclass(frozen=True, kw_only=True)
class PhantomGradient(Estimator):
    r"""Unrolls k damped steps from the settled state (Geng et al. 2021, unrolled form).

        ∇̂_θ = d/dθ L_out(φ_k(θ), θ),    φ_{t+1} = φ_t - τ r(φ_t, θ) = (1-τ) φ_t + τ F(φ_t, θ)

    where φ_0 is the end of the free phase, held constant, and r is `φ - F(φ, θ)` for a `FixedPoint`
    or `∂L_in/∂φ` for a `Bilevel`. At an exact equilibrium all φ_t are the same, and the result is
    that of `NeumannSeries(terms=k, alpha=τ)`. Elsewhere the steps settle φ further, and are
    themselves differentiated. With one step and τ = 1 this is Jacobian-free backpropagation.

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
        params = {name: p.detach().requires_grad_() for name, p in free.params.items()}
        meta = {name: m.detach().requires_grad_() for name, m in evaluation.meta_params.items()}
        evaluation.stage.stand_at(free)
        with SecondDerivatives(evaluation, type(self).__name__):
            for step in range(self.steps):
                residual = evaluation.residual(params, meta, step)
                moved = zip(params.items(), residual, strict=True)
                params = {name: p - self.damping * r for (name, p), r in moved}
            batches = evaluation.batch_steps("outer")
            losses = [evaluation.evaluate("outer", params, meta, step) for step in batches]
            grads = torch.autograd.grad(
                torch.stack(losses).mean(),
                list(meta.values()),
                allow_unused=True,
                materialize_grads=True,
            )
        evaluation.tally.spend(2 * self.steps + len(batches))
        return Estimate(grads=dict(zip(meta, grads, strict=True)), phases=(free,))
