"""equigrad: meta-gradients through anything that settles."""

from equigrad import nn, training
from equigrad.check import Check, check_meta_gradient
from equigrad.errors import (
    ConfigurationError,
    CurvatureError,
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
from equigrad.solvers import LBFGS, BlackBox, GradientDescent, Phase, Solver, TorchOptimizer

__version__ = "0.1.0"

__all__ = [
    "LBFGS",
    "T1T2",
    "Bilevel",
    "BlackBox",
    "Check",
    "ConfigurationError",
    "ConjugateGradient",
    "Contrastive",
    "CurvatureError",
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
