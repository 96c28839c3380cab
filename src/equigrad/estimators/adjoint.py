"""Implicit differentiation that finds the adjoint as a fixed point."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from equigrad.errors import CurvatureError, SettlingError
from equigrad.estimators.estimator import Traits
from equigrad.estimators.implicit import Implicit, Linear, Solution
from equigrad.fields import require
from equigrad.problems import Params
from equigrad.solvers import Anderson, Phase, Solver, settle
from equigrad.vectors import flatten, unflatten

_NO_VALUE: Any = None
"""Solvers of maps evaluate no loss."""


@dataclass(frozen=True, kw_only=True)
class Adjoint(Implicit):
    r"""Solves `(∂r/∂φ)ᵀ x = ∂L_out/∂φ` as a fixed point, with any solver of maps.

        x = (∂F/∂φ)ᵀ x + ∂L_out/∂φ

    With `Picard()` this is recurrent backpropagation (Almeida 1987, Pineda 1987), run to
    convergence; with `Anderson()` or `Broyden()` it is the backward pass of deep equilibrium models
    (Bai, Kolter, Koltun 2019). If samples settle independently, the adjoint of each must converge.

    Attributes:
        solver: the solver of x, which starts at `∂L_out/∂φ`. Its `tol` is relative to the largest
            norm of `∂L_out/∂φ` of a sample. Without `tol`, all `max_steps` are taken; with
            `Picard`, x is then a series with that number of terms.

    Raises:
        ConfigurationError: the argument is not a solver, or a solver that compares values of a loss
            or compiles.
        CurvatureError: from `meta_gradient`, if x diverges.
    """

    traits: ClassVar[Traits] = Traits(
        idea="implicit, adjoint as a fixed point",
        cost="2K + 3",
        error="vanishes as K → ∞",
        double_backward=True,
        energy=False,
        one_system=True,
    )

    remedy: ClassVar[str] = "give its solver more steps or a lower tol, or use GMRES()"

    solver: Solver = field(default_factory=lambda: Anderson(tol=1e-6, max_steps=100))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.solver.fixed_loss,
            f"{type(self.solver).__name__} compares values of a loss, but the adjoint is the "
            f"fixed point of a map, which has no loss. Use Anderson(), Broyden() or Picard()",
        )
        require(
            not self.solver.compile,
            "the solver of Adjoint cannot have compile=True; use compile=False",
        )

    def solve(self, linear: Linear, pressure: Tensor, notes: list[str]) -> Solution:
        """Find x as a fixed point."""
        forces = dict(zip(linear.params, unflatten(pressure, linear.leaves), strict=True))
        pushes = [f.reshape(len(f) if linear.samples else 1, -1) for f in forces.values()]
        norms = torch.stack([torch.linalg.vector_norm(f, dim=1) for f in pushes]).norm(dim=0)
        size = norms.max().item()
        if not 0 < size < math.inf:
            return Solution(pressure)

        def velocity(x: Params, step: int) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
            flat = flatten(list(x.values()))
            with torch.enable_grad():  # the first product records the graph
                moves = pressure - linear.product(flat)
            return tuple(unflatten(moves, linear.leaves)), _NO_VALUE

        tol = None if self.solver.tol is None else self.solver.tol * size
        solver = dataclasses.replace(self.solver, tol=tol)
        try:
            settled = settle(velocity, _NO_VALUE, forces, solver, samples=linear.samples)
        except SettlingError as error:
            raise CurvatureError(
                "Adjoint diverges: the iteration x ← (∂F/∂φ)ᵀ x + ∂L_out/∂φ is not a contraction "
                "at the settled φ. Use GMRES(), or Adjoint(solver=Broyden())"
            ) from error
        if settled.phase.failed:
            relative = dataclasses.replace(
                settled.phase,
                start_residual=settled.phase.start_residual / size,
                residual=settled.phase.residual / size,
                tol=self.solver.tol,
                residuals=_over(settled.phase, size),
            )
            notes.append(
                f"the adjoint has not converged (residuals relative to ∂L_out/∂φ): {relative}"
            )
        return Solution(flatten(list(settled.params.values())))


def _over(phase: Phase, size: float) -> Tensor | None:
    return None if phase.residuals is None else phase.residuals / size
