"""Picard's iteration of a map, with optional damping."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equigrad.fields import Count, Damping
from equigrad.solvers.solver import Objective, Solver


@dataclass(frozen=True, kw_only=True)
class Picard(Solver):
    """Iterates a map, with optional damping.

        φ ← (1 - d) φ + d F(φ, θ)

    which converges if F contracts. With d = 1 it is Picard's iteration; d < 1 also settles maps
    whose Jacobian has large negative or imaginary eigenvalues.

    Attributes:
        damping: d in (0, 1].

    Raises:
        ConfigurationError: a value is out of range.

    Example:
        >>> Picard(tol=1e-6, max_steps=200).damping
        1.0
    """

    differentiable: ClassVar[bool] = True

    damping: Damping = 1.0
    check_every: Count = 1

    def init(self, params: list[Tensor], previous: list[Tensor] | None = None) -> list[Tensor]:
        """An empty state."""
        return []

    def update(
        self,
        params: list[Tensor],
        velocity: tuple[Tensor, ...],
        state: list[Tensor],
        objective: Objective,
    ) -> None:
        """One step."""
        torch._foreach_add_(params, velocity, alpha=self.damping)
