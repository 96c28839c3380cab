"""What is to be settled, and by what it is judged: one kind of problem a file."""

from equigrad.problems.bilevel import Bilevel
from equigrad.problems.energy_based import EnergyBased, Primitive
from equigrad.problems.fixed_point import FixedPoint, Relaxation
from equigrad.problems.problem import (
    Loss,
    Params,
    Part,
    Problem,
    Pull,
    Regularizer,
    Velocity,
    check_scalar,
    inner_product,
    pull_back,
    scalar,
    slope,
)

__all__ = [
    "Bilevel",
    "EnergyBased",
    "FixedPoint",
    "Loss",
    "Params",
    "Part",
    "Primitive",
    "Problem",
    "Pull",
    "Regularizer",
    "Relaxation",
    "Velocity",
    "check_scalar",
    "inner_product",
    "pull_back",
    "scalar",
    "slope",
]
