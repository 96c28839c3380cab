"""Reptile: an initialisation that moves towards the learner's solutions."""

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
    r"""Moves the initialisation towards the end of learning (Nichol, Achiam, Schulman 2018).

        ∇̂_θ = (∂φ_0/∂θ)ᵀ (φ_0 - φ_T)

    This is not a gradient of the outer loss, which is only evaluated and reported: a descent step
    along it moves φ_0 towards φ_T. Averaged over tasks, and for few small steps, it reduces the
    inner loss and increases the agreement of its gradients between batches.

    Raises:
        ProblemError: from `meta_gradient`, if `params` were not computed from `meta_params`, or a
            meta-parameter acts only in another way.
    """

    traits: ClassVar[Traits] = Traits(
        idea="change of params, φ_0 - φ_T",
        cost="0",
        error="not a gradient of L_out",
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
        """The difference from the end to the start."""
        way = {name: p - free.params[name] for name, p in evaluation.params.items()}
        return way, {name: torch.zeros_like(m) for name, m in evaluation.meta_params.items()}
