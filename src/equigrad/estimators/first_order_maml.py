"""First-order MAML: MAML without the derivative of the learner's steps."""

from dataclasses import dataclass
from typing import ClassVar

from equigrad.estimators.estimator import Traits
from equigrad.estimators.start import ThroughStart
from equigrad.evaluation import Evaluation
from equigrad.problems import Params
from equigrad.solvers import Settled


@dataclass(frozen=True, kw_only=True)
class FirstOrderMAML(ThroughStart):
    r"""First-order MAML, with the outer gradient at the end in place of that at the start.

        ∇̂_θ = ∂L_out/∂θ + (∂φ_0/∂θ)ᵀ ∂L_out/∂φ(φ_T)

    (Finn, Abbeel, Levine 2017). This is `MAML` with the identity in place of `∂φ_T/∂φ_0`, correct
    to first order in the distance that the learner moves. It takes first-order gradients only.

    Raises:
        ProblemError: from `meta_gradient`, if `params` were not computed from `meta_params`, or a
            meta-parameter acts only through the inner loss.
    """

    traits: ClassVar[Traits] = Traits(
        idea="MAML, identity for ∂φ_T/∂φ_0",
        cost="1",
        error="grows with T",
        double_backward=False,
        energy=False,
        equilibrium=False,
        sees_start=True,
        needs_start=True,
    )

    def sees(self, evaluation: Evaluation) -> set[str]:
        """The start and the direct term."""
        return {*evaluation.reaches.start, *evaluation.reaches.loss("outer")}

    def adjoint(self, evaluation: Evaluation, free: Settled) -> tuple[Params, Params]:
        """The outer gradient at the end of the phase."""
        return evaluation.outer_gradients(free)
