"""Evolution strategies: differences of the outer loss at random meta-parameters."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equigrad.estimators.estimator import Estimate, Estimator, Traits
from equigrad.evaluation import Evaluation
from equigrad.fields import Count, Positive
from equigrad.solvers import Solver
from equigrad.vectors import flatten, unflatten


@dataclass(frozen=True, kw_only=True)
class EvolutionStrategies(Estimator):
    r"""The gradient of a smoothed outer loss, from its values at random meta-parameters.

        ∇̂_θ = (1/n) Σ_i [ L(θ + σε_i) - L(θ - σε_i) ] / 2σ · ε_i,    ε_i ~ N(0, I)

    in antithetic pairs, where `L(θ)` is the outer loss after a free phase at θ (Salimans et al.
    2017). Nothing is differentiated, so that any solver and any model works; all phases share
    batches and random numbers. The relative standard error, about `√((dim θ + 1) / n)` for small σ,
    is reported as `error_estimate`. A dependence of the initial `params` on θ is included, to first
    order in σ.

    Attributes:
        pairs: n; each pair costs two further free phases.
        sigma: standard deviation σ of the perturbations, in the units of θ.
        seed: seed of the perturbations.

    Example:
        >>> from equigrad.testing import Quadratic
        >>> import equigrad as eg
        >>> q = Quadratic(dim=2)
        >>> result = eg.meta_gradient(
        ...     q.problem,
        ...     q.params(),
        ...     q.meta_params(),
        ...     solver=q.solver(100),
        ...     estimator=EvolutionStrategies(pairs=50),
        ... )
        >>> q.relative_error(result.grads["theta"]) < 3 * result.error_estimate
        True
    """

    traits: ClassVar[Traits] = Traits(
        idea="zeroth order, antithetic pairs",
        cost="2KT",
        error="noise, O(σ²); vanishes as K → ∞",
        double_backward=False,
        energy=False,
        equilibrium=False,
        sees_start=True,
        steps=True,
    )

    pairs: Count = 32
    sigma: Positive = 1e-2
    seed: int = 0

    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle at θ, then at every perturbed θ."""
        free = evaluation.settle(solver)
        evaluation = evaluation.holding(free)
        meta = list(evaluation.meta_params.values())
        generator = torch.Generator().manual_seed(self.seed)
        total, squares = (torch.zeros_like(flatten(meta)) for _ in range(2))
        missed: set[str] = set()
        for _ in range(self.pairs):
            noise = torch.randn(total.shape, generator=generator, dtype=total.dtype).to(total)
            above, below = (
                self._loss_at(evaluation, solver, sign * self.sigma * noise, missed)
                for sign in (1, -1)
            )
            sample = (above - below) / (2 * self.sigma) * noise
            total += sample
            squares += sample.square()
        if missed:
            evaluation.tally.note(
                f"some of the free phases at perturbed meta-parameters ended "
                f"{', '.join(sorted(missed))}"
            )
        mean = total / self.pairs
        error = None
        if self.pairs > 1 and mean.any():
            variance = (squares / self.pairs - mean.square()).clamp(min=0).sum() / (self.pairs - 1)
            error = (variance.sqrt() / mean.norm()).item()
        grads = dict(zip(evaluation.meta_params, unflatten(mean, meta), strict=True))
        return Estimate(grads=grads, phases=(free,), error_estimate=error)

    def _loss_at(
        self, evaluation: Evaluation, solver: Solver, shift: Tensor, missed: set[str]
    ) -> Tensor:
        """The outer loss after a free phase at shifted meta-parameters."""
        shifts = unflatten(shift, list(evaluation.meta_params.values()))
        direction = dict(zip(evaluation.meta_params, shifts, strict=True))
        start = evaluation.start.push(direction)
        there = evaluation.at(
            {name: p + start[name] for name, p in evaluation.params.items()},
            {name: m + direction[name] for name, m in evaluation.meta_params.items()},
        )
        settled = there.settle(solver)
        if settled.phase.outcome not in ("converged", "stopped"):
            missed.add(settled.phase.outcome)
        elif settled.phase.diverged:
            missed.add("diverged in part")
        return there.outer_loss(settled)
