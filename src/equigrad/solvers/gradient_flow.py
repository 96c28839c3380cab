"""Dynamics in continuous time, by Euler's method."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.fields import Count, Positive
from equigrad.solvers.solver import Objective, Solver


@dataclass(frozen=True, kw_only=True)
class GradientFlow(Solver):
    """Follows the dynamics `τ dφ/dt = velocity(φ, θ)` by Euler's method.

        φ ← φ + (dt/τ) velocity(φ, θ)

    For a loss this is its gradient flow; for a map, a leaky network with time constant τ.

    Attributes:
        dt: length of a step in time, in the unit of τ.
        tau: time constant τ of all parameters, or by name (1 for names that are left out).

    Raises:
        ConfigurationError: a value is out of range; in a phase, tau has a name that no parameter
            has.

    Example:
        >>> GradientFlow(dt=0.1, max_steps=500, tol=1e-4).tau
        1.0
    """

    differentiable: ClassVar[bool] = True

    dt: Positive = 0.1
    tau: Positive | Mapping[str, Positive] = 1.0
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
        names, tau = objective.params, self.tau
        if isinstance(tau, Mapping):
            unknown = sorted(tau.keys() - names.keys())
            if unknown:
                raise ConfigurationError(
                    f"tau has the name {unknown[0]!r}, which is not one of the params: "
                    f"{', '.join(map(repr, names))}"
                )
        for name, p, v in zip(names, params, velocity, strict=True):
            p.add_(v, alpha=self.dt / (tau.get(name, 1.0) if isinstance(tau, Mapping) else tau))
