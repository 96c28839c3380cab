"""What an estimator is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from equigrad.evaluation import Evaluation
from equigrad.solvers import Settled, Solver


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

    @abstractmethod
    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle what is needed and estimate `dL_out/dθ`."""
