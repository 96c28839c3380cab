"""equigrad: meta-gradients through anything that settles."""

from equigrad import nn, training
from equigrad.check import Check, check_meta_gradient
from equigrad.errors import (
    ConfigurationError,
    CurvatureError,
    DataError,
    DoubleBackwardError,
    EquigradError,
    ProblemError,
    RunError,
    SettlingError,
)
from equigrad.estimators import (
    T1T2,
    ConjugateGradient,
    Contrastive,
    Estimator,
    ExactSolve,
    FiniteDifferenceT1T2,
    NeumannSeries,
    Nystrom,
)
from equigrad.gradient import MetaGradient, meta_gradient
from equigrad.problem import Bilevel
from equigrad.solvers import LBFGS, GradientDescent, Phase, Solver, TorchOptimizer

__version__ = "0.1.0"

__all__ = [
    "LBFGS",
    "T1T2",
    "Bilevel",
    "Check",
    "ConfigurationError",
    "ConjugateGradient",
    "Contrastive",
    "CurvatureError",
    "DataError",
    "DoubleBackwardError",
    "EquigradError",
    "Estimator",
    "ExactSolve",
    "FiniteDifferenceT1T2",
    "GradientDescent",
    "MetaGradient",
    "NeumannSeries",
    "Nystrom",
    "Phase",
    "ProblemError",
    "RunError",
    "SettlingError",
    "Solver",
    "TorchOptimizer",
    "check_meta_gradient",
    "meta_gradient",
    "nn",
    "training",
]
