"""How a problem settles: one algorithm a file, one loop for all."""

from equigrad.solvers.black_box import BlackBox, FlatObjective
from equigrad.solvers.gradient_descent import GradientDescent
from equigrad.solvers.lbfgs import LBFGS
from equigrad.solvers.settle import Moment, Phase, Settled, Watch, settle
from equigrad.solvers.solver import Solver
from equigrad.solvers.torch_optimizer import TorchOptimizer

__all__ = [
    "LBFGS",
    "BlackBox",
    "FlatObjective",
    "GradientDescent",
    "Moment",
    "Phase",
    "Settled",
    "Solver",
    "TorchOptimizer",
    "Watch",
    "settle",
]
