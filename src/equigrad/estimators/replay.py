"""A free phase once more, as something that can be differentiated."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.evaluation import Evaluation
from equigrad.solvers import Solver

_NO_OBJECTIVE: Any = None
"""A differentiable solver does not look around."""


def replay(
    evaluation: Evaluation,
    solver: Solver,
    params: Mapping[str, Tensor],
    state: list[Tensor],
    meta_params: Mapping[str, Tensor],
    steps: range,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Take the solver's own steps on copies, so that their graph leads back to what was given.

    Every step sees the batch and the random numbers that it saw in the free phase.

    Args:
        evaluation: evaluates the residual.
        solver: a differentiable one.
        params: φ before the first step; all require a gradient.
        state: the solver's state before the first step.
        meta_params: θ.
        steps: the numbers of the steps to take.

    Returns:
        φ and the solver's state after the last step.
    """
    now = dict(params)
    evaluation.gradient_evaluations += len(steps)
    for step in steps:
        velocity = tuple(-r for r in evaluation.residual(now, meta_params, step))
        now = {name: p.clone() for name, p in now.items()}
        state = [s.clone() for s in state]
        solver.update(list(now.values()), velocity, state, _NO_OBJECTIVE)
    return now, state


def require_differentiable(solver: Solver, who: str) -> None:
    """Refuse a solver whose steps cannot be differentiated as they stand."""
    if not solver.differentiable:
        raise ConfigurationError(
            f"{who} differentiates the solver's steps, and those of {type(solver).__name__} are "
            f"not plain tensor arithmetic; use GradientDescent, or an estimator that asks nothing "
            f"of the solver"
        )
