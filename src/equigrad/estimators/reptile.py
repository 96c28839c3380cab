"""Reptile."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from equigrad.estimators.estimator import Traits
from equigrad.estimators.start import ThroughStart
from equigrad.evaluation import Evaluation
from equigrad.problems import Params
from equigrad.solvers import Settled


@dataclass(frozen=True, kw_only=True)
class Reptile(ThroughStart):
    r"""Moves the initialisation to where the learner went (Nichol, Achiam, Schulman 2018).

        ∇̂_θ = (∂φ_0/∂θ)ᵀ (φ_0 - φ_T)

    No gradient of the outer loss, which is evaluated and reported but plays no part: a step of
    descent along it goes from φ_0 towards φ_T. Averaged over tasks and for few small steps, it
    points where the inner loss falls, and further where its gradients agree between batches.

    Raises:
        ProblemError: from `meta_gradient`, where `params` were not computed from `meta_params`, or
            a meta-parameter acts in another way alone.
    """

    traits: ClassVar[Traits] = Traits(
        idea="way of the settled params, φ_0 - φ_T",
        cost="0",
        error="no gradient of L_out",
        double_backward=False,
        energy=False,
        equilibrium=False,
        sees_start=True,
        needs_start=True,
    )

    def sees(self, evaluation: Evaluation) -> set[str]:
        """The start alone."""
        return set(evaluation.reaches.start)

    def adjoint(self, evaluation: Evaluation, free: Settled) -> tuple[Params, Params]:
        """The way from the end back to the start."""
        way = {name: p - free.params[name] for name, p in evaluation.params.items()}
        return way, {name: torch.zeros_like(m) for name, m in evaluation.meta_params.items()}
