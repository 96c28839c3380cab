"""What an estimator is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from equigrad.evaluation import Evaluation
from equigrad.solvers import Settled, Solver


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What an estimator needs and gives: the tables and the error messages are made from this.

    Attributes:
        idea: in a few words, how it has the gradient.
        cost: gradient evaluations beyond the free phase; T steps in it, K in what follows.
        error: what remains wrong at equilibrium, however long it computes.
        double_backward: differentiates a gradient once more.
    """

    idea: str
    cost: str
    error: str
    double_backward: bool


@dataclass(frozen=True)
class Estimate:
    """What an estimator returns.

    Attributes:
        grads: an estimate of `dL_out/dθ`, by name.
        phases: every phase that was settled, the free one first.
        error_estimate: estimated relative error of `grads`, or None where the estimator has none.
    """

    grads: dict[str, Tensor]
    phases: tuple[Settled, ...]
    error_estimate: float | None = None


@dataclass(frozen=True, kw_only=True)
class Estimator(ABC):
    """How the gradient of θ is had from a problem that settles."""

    traits: ClassVar[Traits]

    @abstractmethod
    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle what is needed and estimate `dL_out/dθ`."""
