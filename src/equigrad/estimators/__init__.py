"""How the gradient of θ is had: one estimator a file, all behind `equigrad.meta_gradient`."""

from equigrad.estimators.conjugate_gradient import ConjugateGradient
from equigrad.estimators.contrastive import Contrastive
from equigrad.estimators.estimator import Estimate, Estimator, Traits
from equigrad.estimators.exact_solve import ExactSolve
from equigrad.estimators.finite_difference_t1t2 import FiniteDifferenceT1T2
from equigrad.estimators.neumann_series import NeumannSeries
from equigrad.estimators.nystrom import Nystrom
from equigrad.estimators.t1t2 import T1T2

ESTIMATORS: tuple[type[Estimator], ...] = (
    Contrastive,
    FiniteDifferenceT1T2,
    T1T2,
    NeumannSeries,
    ConjugateGradient,
    Nystrom,
    ExactSolve,
)
"""All that there are, the first-order ones first: `equigrad list` and the docs' table."""

__all__ = [
    "ESTIMATORS",
    "T1T2",
    "ConjugateGradient",
    "Contrastive",
    "Estimate",
    "Estimator",
    "ExactSolve",
    "FiniteDifferenceT1T2",
    "NeumannSeries",
    "Nystrom",
    "Traits",
]
