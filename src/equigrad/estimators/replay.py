"""A free phase as something that can be differentiated."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.evaluation import Evaluation
from equigrad.problems import Params
from equigrad.solvers import Settled, Solver, settle
from equigrad.solvers.update_rules import UPDATE_RULES

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
            return evaluation.moves(now, meta_params, step), _NO_VALUE

    return settle(
        velocity,
        _NO_VALUE,
        params,
        solver,
        meta_params=meta_params,
        previous=state,
        first_step=steps.start,
        steps=len(steps),
        batches=len(evaluation.batch_steps("inner")),
        count=evaluation.tally.spend,
        graph=True,
    )


def recorded(solver: Solver, who: str) -> Solver:
    """A solver that takes the same steps such that they can be differentiated.

    Raises:
        ConfigurationError: they cannot be.
    """
    found = solver.recorded()
    if found is None:
        what = getattr(solver, "optimizer", type(solver)).__name__
        raise ConfigurationError(
            f"{who} differentiates the solver's steps, and those of {what} are not plain tensor "
            f"arithmetic; use GradientDescent, TorchOptimizer with {_served()}, or an estimator "
            f"that asks nothing of the solver"
        )
    return found


def _served() -> str:
    *names, last = (optimizer.__name__ for optimizer in UPDATE_RULES)
    return f"{', '.join(names)} or {last}"
