"""equigrad: meta-gradients through anything that settles."""

from equigrad import nn, tasks, training
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
    GMRES,
    IMAML,
    MAML,
    T1T2,
    ConjugateGradient,
    Contrastive,
    Estimator,
    EvolutionStrategies,
    ExactSolve,
    FiniteDifferenceT1T2,
    FirstOrderMAML,
    ForwardMode,
    NeumannSeries,
    Nystrom,
    Reptile,
    Unrolled,
)
from equigrad.gradient import MetaGradient, meta_gradient
from equigrad.problem import Bilevel, FixedPoint, Problem
from equigrad.solvers import LBFGS, BlackBox, GradientDescent, Phase, Solver, TorchOptimizer

__version__ = "0.1.0"

__all__ = [
    "GMRES",
    "IMAML",
    "LBFGS",
    "MAML",
    "T1T2",
    "Bilevel",
    "BlackBox",
    "Check",
    "ConfigurationError",
    "ConjugateGradient",
    "Contrastive",
    "CurvatureError",
    "DataError",
    "DoubleBackwardError",
    "EquigradError",
    "Estimator",
    "EvolutionStrategies",
    "ExactSolve",
    "FiniteDifferenceT1T2",
    "FirstOrderMAML",
    "FixedPoint",
    "ForwardMode",
    "GradientDescent",
    "MetaGradient",
    "NeumannSeries",
    "Nystrom",
    "Phase",
    "Problem",
    "ProblemError",
    "Reptile",
    "RunError",
    "SettlingError",
    "Solver",
    "TorchOptimizer",
    "Unrolled",
    "check_meta_gradient",
    "meta_gradient",
    "nn",
    "tasks",
    "training",
]
