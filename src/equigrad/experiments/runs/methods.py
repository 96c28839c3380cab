"""Estimators by name, and their labels in tables and reports."""

from typing import Literal

from equigrad import estimators
from equigrad.estimators import Contrastive, Estimator

EstimatorName = Literal[
    "contrastive",
    "t1t2",
    "finite-difference-t1t2",
    "neumann-series",
    "conjugate-gradient",
    "gmres",
    "adjoint",
    "phantom-gradient",
    "least-control",
    "nystrom",
    "exact-solve",
    "unrolled",
    "forward-mode",
    "evolution-strategies",
]
OTHERS: dict[EstimatorName, str] = {
    "finite-difference-t1t2": "FiniteDifferenceT1T2",
    "neumann-series": "NeumannSeries",
    "conjugate-gradient": "ConjugateGradient",
    "gmres": "GMRES",
    "adjoint": "Adjoint",
    "phantom-gradient": "PhantomGradient",
    "least-control": "LeastControl",
    "nystrom": "Nystrom",
    "exact-solve": "ExactSolve",
    "unrolled": "Unrolled",
    "forward-mode": "ForwardMode",
    "evolution-strategies": "EvolutionStrategies",
}
"""Classes of the estimators other than the two that the paper compares."""

PAPERS_RULE = Contrastive(beta=0.1, scheme="forward", nudge="loss", error=False)
"""The paper's rule, nudged by the outer loss itself, with matched phases."""

LABELS = {
    "unregularised": "unregularised",
    "single": "best single strength",
    **{name: f"per weight, {other}" for name, other in OTHERS.items()},
    "t1t2": "per weight, T1–T2",
    "contrastive": "per weight, contrastive",
}
"""Names of methods in tables and reports."""


def other(name: EstimatorName) -> Estimator:
    """An estimator of `OTHERS` with its own defaults; its module is imported in this call."""
    kind: type[Estimator] = getattr(estimators, OTHERS[name])
    return kind()
