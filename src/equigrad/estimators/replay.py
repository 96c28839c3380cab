"""A free phase as something that can be differentiated."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.evaluation import Evaluation
from equigrad.problems import Params
from equigrad.solvers import Settled, Solver, settle

_NO_VALUE: Any = None
"""A differentiable solver does not look at the loss."""


def replay(
    evaluation: Evaluation,
    solver: Solver,
    params: Mapping[str, Tensor],
    state: list[Tensor],
    meta_params: Mapping[str, Tensor],
    steps: range,
) -> Settled:
    """Take the solver's own steps so that their graph leads back to what was given.

    Every step sees the batch and the random numbers that the free phase shows it.

    Args:
        evaluation: evaluates the residual, with the buffers as it now stands.
        solver: a differentiable one.
        params: φ before the first step; all require a gradient.
        state: the solver's state before the first step.
        meta_params: θ.
        steps: the numbers of the steps to take.

    Returns:
        The state after the last step, whose params and solver state have their graph.
    """

    def velocity(now: Params, step: int) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
        with torch.enable_grad():
            return tuple(-r for r in evaluation.residual(now, meta_params, step)), _NO_VALUE

    return settle(
        velocity,
        _NO_VALUE,
        params,
        solver,
        previous=state,
        first_step=steps.start,
        steps=len(steps),
        batches=len(evaluation.batch_steps("inner")),
        count=evaluation.tally.spend,
        graph=True,
    )


def require_differentiable(solver: Solver, who: str) -> None:
    """Refuse a solver whose steps cannot be differentiated as they stand."""
    if not solver.differentiable:
        raise ConfigurationError(
            f"{who} differentiates the solver's steps, and those of {type(solver).__name__} are "
            f"not plain tensor arithmetic; use GradientDescent, or an estimator that asks nothing "
            f"of the solver"
        )
