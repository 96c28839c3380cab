"""The error of an implicit hypergradient where the free phase has not quite come to rest."""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from equigrad.errors import CurvatureError
from equigrad.estimators.solve_error import (
    LOOKED_INTO,
    Linear,
    Solved,
    SolveError,
    correction,
    newton_step,
    solve_error,
)
from equigrad.evaluation import Evaluation
from equigrad.problems import Params
from equigrad.solvers import Settled
from equigrad.vectors import flatten, relative, unflatten

AT_REST = 1e3
"""A step of at most this many rounding errors of φ is none."""

OWN = 0.5
"""The error is the solver's if its own residual is this share of the one at φ'."""


def rest_error(evaluation: Evaluation, free: Settled, solved: Solved) -> SolveError:
    r"""The error of a gradient at φ, as it is seen from where φ would have come to rest.

        φ' = φ - (∂r/∂φ)⁻¹ r,    x' = x + δ,    δ ≈ (∂r/∂φ)⁻ᵀ [∂L_out/∂φ - (∂r/∂φ)ᵀ x]  at φ',

        G' = ∂L_out/∂θ - (∂r/∂θ)ᵀ x'  at φ',    error ≈ ‖∇_θ - G'‖ / ‖G'‖

    The step to φ' is that of Newton's method: exact where the residual is linear in φ. Conjugate
    gradients and, if the matrix is symmetric, GMRES have its part in their own Krylov space without
    a product, and take up to four for the rest; an exact solve or Nyström's has it from the same
    matrix; for others, it takes up to twelve. The bracket contains what the solver has left over as
    well as what the step adds to it. As in `solve_error`, δ is rough at first, and takes six
    products where the error is above 1e-5; the larger of the two errors counts. If the step is of
    rounding's size, only the solver's own residual is looked at. A phase that ended with more than
    twice its first residual has led away from rest: the error is then the gradient's own size.

    Args:
        evaluation: evaluates the losses.
        free: the end of the free phase.
        solved: the system there, its solution x, and the step if the solver knows it.
    """
    linear, solution, pressure = solved.linear, solved.solution, solved.pressure
    if not pressure.norm() > 0:
        return solve_error(solved)
    left = solution.residual
    left = pressure - linear.product(solution.x) if left is None else left
    own = (left.norm() / pressure.norm()).item()
    if free.phase.residual > 2 * free.phase.start_residual:  # settling led away from rest
        return SolveError(own, 1.0, unsettled=True)
    try:
        least = AT_REST * torch.finfo(pressure.dtype).eps * flatten(linear.leaves).norm().item()
        step = newton_step(linear, solution, least * (pressure.norm() / solution.x.norm()).item())
        if not step.norm().item() > least:
            known = dataclasses.replace(solution, residual=left)
            return solve_error(dataclasses.replace(solved, solution=known))
        shift = unflatten(step, linear.leaves)
        moved = {n: p - s for (n, p), s in zip(free.params.items(), shift, strict=True)}
        at = dataclasses.replace(free, params=moved, velocity=None)
        x = solution.x.to(pressure)
        error, unsolved = _error_from(evaluation, at, linear.at(at), x, solved.grads)
    except CurvatureError:  # a derivative is not finite there
        error = unsolved = math.inf
    error = max(error, min(own, 1.0) * min(solved.weight, 1.0))
    return SolveError(own, error if math.isfinite(error) else 1.0, own < OWN * unsolved)


def _error_from(
    evaluation: Evaluation,
    at: Settled,
    linear: Linear,
    x: Tensor,
    grads: Mapping[str, Tensor],
) -> tuple[float, float]:
    """The difference of a gradient to that at another state, and the share that x leaves there."""
    there = evaluation.at(evaluation.params, evaluation.meta_params)
    forces, direct = there.outer_gradients(at)
    pressure = flatten(list(forces.values())).to(x.dtype)
    mixed, left = linear.mixed(x), pressure - linear.product(x)
    size = pressure.norm()
    if not size > 0:
        return math.inf, math.inf

    def apart(change: Params) -> float:
        found = [d - (mixed[n] + change[n]).to(d.dtype) for n, d in direct.items()]
        return relative([*grads.values()], found)

    unsolved, rough = (left.norm() / size).item(), linear.mixed(left * (x.norm() / size))
    error = max(apart({n: torch.zeros_like(m) for n, m in mixed.items()}), apart(rough))
    if error > LOOKED_INTO:
        missing, short = correction(linear, left)
        error = max(error, apart(linear.mixed((1 + 2 * short) * missing)))
    return error, unsolved
