"""What a solver is."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from equigrad.errors import ConfigurationError

Objective = Callable[[], tuple[Tensor, tuple[Tensor, ...]]]
"""Evaluates the loss and the velocity again, at the parameters as they now are."""


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """How a phase settles: a rule that moves the parameters, and when to stop.

    Attributes:
        max_steps: steps after which a phase stops, settled or not; None for no limit.
        tol: a phase has settled when the Euclidean norm of the velocity `-∂L/∂φ`, taken over all
            parameters, is at most this; None to run all `max_steps`.
        check_every: steps between two looks at that norm.
    """

    max_steps: int | None = 1000
    tol: float | None = None
    check_every: int = 10

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigurationError(f"max_steps must be at least 1, or None, got {self.max_steps}")
        if self.tol is not None and not 0 < self.tol < math.inf:
            raise ConfigurationError(
                f"tol must be positive, got {self.tol}; None runs all max_steps without a tolerance"
            )
        if self.tol is None and self.max_steps is None:
            raise ConfigurationError(
                "a solver needs max_steps, or a tol > 0, or both: with neither it never stops"
            )
        if self.check_every < 1:
            raise ConfigurationError(f"check_every must be at least 1, got {self.check_every}")

    @abstractmethod
    def init(self, params: list[Tensor], previous: Any = None) -> Any:
        """The solver's own state (momentum, for example) for a phase that starts at `params`.

        Args:
            params: the leaves that `update` will move.
            previous: the state in which an earlier phase of the same solver class ended, to go on
                from. It is not changed.
        """

    @abstractmethod
    def update(
        self, params: list[Tensor], velocity: tuple[Tensor, ...], state: Any, objective: Objective
    ) -> None:
        """Move `params` and `state` by one step, in place; called without recording a graph.

        Args:
            params: the leaves.
            velocity: `-∂L/∂φ` at `params`, one tensor a parameter; not to be changed.
            state: what `init` returned.
            objective: evaluates loss and velocity again, for rules that look around.
        """


def require(holds: bool, message: str) -> None:
    """Raise a `ConfigurationError` unless a condition holds."""
    if not holds:
        raise ConfigurationError(message)
