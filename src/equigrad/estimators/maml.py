"""MAML: an initialisation learned by differentiating through the learner's steps."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from equigrad.estimators.estimator import Traits
from equigrad.estimators.unrolled import Unrolled


@dataclass(frozen=True, kw_only=True)
class MAML(Unrolled):
    r"""Model-agnostic meta-learning, which learns an initialisation for fast adaptation.

        ∇_θ = d/dθ L_out(φ_T),   φ_0 = θ,   φ_{t+1} = φ_t - η ∂L_in/∂φ(φ_t)

    (Finn, Abbeel, Levine 2017). It is `Unrolled` under its name in few-shot learning, and requires
    that `params` be computed from `meta_params`: pass the same dictionary as both.

    Raises:
        ProblemError: from `meta_gradient`, if `params` do not depend on `meta_params`.
    """

    traits: ClassVar[Traits] = dataclasses.replace(
        Unrolled.traits, idea="unrolled, for a learned start", needs_start=True
    )
