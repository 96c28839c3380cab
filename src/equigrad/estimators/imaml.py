"""Implicit MAML: a few conjugate gradient steps with a learned proximal centre."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from equigrad.errors import ProblemError
from equigrad.estimators.conjugate_gradient import ConjugateGradient
from equigrad.estimators.estimator import Traits
from equigrad.evaluation import Evaluation
from equigrad.solvers import Solver


@dataclass(frozen=True, kw_only=True)
class IMAML(ConjugateGradient):
    r"""Implicit MAML, which learns a centre that every φ is pulled to.

        L_in = L_data + ½ λ ‖φ - ω‖²,    (I + ∂²L_data/∂φ² / λ) ∇_ω = ∂L_out/∂φ

    (Rajeswaran et al. 2019). It is `ConjugateGradient` with the authors' five iterations, which
    stop at a direction of non-positive curvature, as is common after few steps. It requires a
    regulariser with a learned centre: without one, the settled state does not depend on its start,
    and the gradient is zero.

    Raises:
        ProblemError: from `meta_gradient`, if the problem has no such regulariser.
    """

    traits: ClassVar[Traits] = dataclasses.replace(
        ConjugateGradient.traits, idea="implicit, for a learned centre"
    )

    max_iterations: int = 5
    indefinite: Literal["raise", "stop"] = "stop"

    def check(self, evaluation: Evaluation, solver: Solver) -> None:
        """Also refuse a problem without a learned centre."""
        super().check(evaluation, solver)
        regularizer = evaluation.problem.regularizer
        names = frozenset[str]() if regularizer is None else regularizer.meta_names
        if not any(name.startswith("center") for name in names):
            raise ProblemError(
                "IMAML learns the centre of a proximal term, but the regularizer of this problem "
                "has no meta-parameter 'center…'. Use regularizer=equigrad.nn.ComplexSynapse(…, "
                "learn=('center',)), or ConjugateGradient() for other meta-parameters"
            )
