"""What holds an estimator to its word: problems with known answers, and a suite over them."""

from equigrad.testing.cases import (
    ALL_CASES,
    CASES,
    ENERGY_CASES,
    MAP_CASES,
    START_CASES,
    Case,
    affine_map_case,
    hopfield_case,
    isotropic_case,
    logistic_case,
    picard,
    proximal_case,
    quadratic_case,
    ridge_case,
    scalar_case,
    settling,
    start_case,
    tanh_map_case,
)
from equigrad.testing.conformance import check_estimator
from equigrad.testing.quadratic import Quadratic

__all__ = [
    "ALL_CASES",
    "CASES",
    "ENERGY_CASES",
    "MAP_CASES",
    "START_CASES",
    "Case",
    "Quadratic",
    "affine_map_case",
    "check_estimator",
    "hopfield_case",
    "isotropic_case",
    "logistic_case",
    "picard",
    "proximal_case",
    "quadratic_case",
    "ridge_case",
    "scalar_case",
    "settling",
    "start_case",
    "tanh_map_case",
]
