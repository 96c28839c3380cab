"""The tuple of all estimators, in the order of the tables."""

from equigrad.estimators.adjoint import Adjoint
from equigrad.estimators.conjugate_gradient import ConjugateGradient
from equigrad.estimators.contrastive import Contrastive
from equigrad.estimators.estimator import Estimator
from equigrad.estimators.evolution_strategies import EvolutionStrategies
from equigrad.estimators.exact_solve import ExactSolve
from equigrad.estimators.finite_difference_t1t2 import FiniteDifferenceT1T2
from equigrad.estimators.first_order_maml import FirstOrderMAML
from equigrad.estimators.forward_mode import ForwardMode
from equigrad.estimators.gmres import GMRES
from equigrad.estimators.imaml import IMAML
from equigrad.estimators.least_control import LeastControl
from equigrad.estimators.maml import MAML
from equigrad.estimators.neumann_series import NeumannSeries
from equigrad.estimators.nystrom import Nystrom
from equigrad.estimators.phantom_gradient import PhantomGradient
from equigrad.estimators.reptile import Reptile
from equigrad.estimators.t1t2 import T1T2
from equigrad.estimators.unrolled import Unrolled

ESTIMATORS: tuple[type[Estimator], ...] = (
    Contrastive,
    FiniteDifferenceT1T2,
    T1T2,
    NeumannSeries,
    PhantomGradient,
    ConjugateGradient,
    GMRES,
    Adjoint,
    Nystrom,
    ExactSolve,
    IMAML,
    LeastControl,
    Unrolled,
    ForwardMode,
    MAML,
    FirstOrderMAML,
    Reptile,
    EvolutionStrategies,
)
"""All estimators, in the order of `equigrad list` and of the docs' table."""
