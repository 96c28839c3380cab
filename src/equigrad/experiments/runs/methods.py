"""Estimators by the names that runs know them by, and what tables and reports call them."""

from typing import Literal

from equigrad.estimators import (
    GMRES,
    Adjoint,
    ConjugateGradient,
    Estimator,
    EvolutionStrategies,
    ExactSolve,
    FiniteDifferenceT1T2,
    ForwardMode,
    LeastControl,
    NeumannSeries,
    Nystrom,
    PhantomGradient,
    Unrolled,
)

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
OTHERS: dict[EstimatorName, type[Estimator]] = {
    "finite-difference-t1t2": FiniteDifferenceT1T2,
    "neumann-series": NeumannSeries,
    "conjugate-gradient": ConjugateGradient,
    "gmres": GMRES,
    "adjoint": Adjoint,
    "phantom-gradient": PhantomGradient,
    "least-control": LeastControl,
    "nystrom": Nystrom,
    "exact-solve": ExactSolve,
    "unrolled": Unrolled,
    "forward-mode": ForwardMode,
    "evolution-strategies": EvolutionStrategies,
}
"""Estimators beside the two that the paper compares."""

LABELS = {
    "unregularised": "unregularised",
    "single": "best single strength",
    **{name: f"per weight, {other.__name__}" for name, other in OTHERS.items()},
    "t1t2": "per weight, T1–T2",
    "contrastive": "per weight, contrastive",
}
"""What tables and reports call a method."""
