"""How a problem settles: one algorithm a file, one loop for all."""

from equigrad.solvers.anderson import Anderson
from equigrad.solvers.black_box import BlackBox, FlatObjective
from equigrad.solvers.broyden import Broyden
from equigrad.solvers.gradient_descent import GradientDescent
from equigrad.solvers.gradient_flow import GradientFlow
from equigrad.solvers.lbfgs import LBFGS
from equigrad.solvers.phase import Lost, Moment, Phase, Settled, Watch
from equigrad.solvers.picard import Picard
from equigrad.solvers.settle import settle
from equigrad.solvers.solver import Solver
from equigrad.solvers.torch_optimizer import TorchOptimizer

__all__ = [
    "LBFGS",
    "Anderson",
    "BlackBox",
    "Broyden",
    "FlatObjective",
    "GradientDescent",
    "GradientFlow",
    "Lost",
    "Moment",
    "Phase",
    "Picard",
    "Settled",
    "Solver",
    "TorchOptimizer",
    "Watch",
    "settle",
]
