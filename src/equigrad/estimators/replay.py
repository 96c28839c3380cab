"""Replays a free phase so that its steps can be differentiated."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.evaluation import Evaluation
from equigrad.problems import Params
from equigrad.solvers import Settled, Solver, settle
from equigrad.solvers.update_rules import UPDATE_RULES

Residual = Callable[[Params, Params, int], tuple[Tensor, ...]]
"""`(params, meta_params, step)`: what is zero at rest."""

_NO_VALUE: Any = None
"""A differentiable solver evaluates no loss."""


def replay(
    evaluation: Evaluation,
    solver: Solver,
    params: Mapping[str, Tensor],
    state: list[Tensor],
    meta_params: Mapping[str, Tensor],
    steps: range,
    residual: Residual | None = None,
) -> Settled:
    """Take steps of a free phase again, with a graph to params, solver state and θ.

    Every step sees the same batch and random numbers as in the free phase.

    Args:
        evaluation: evaluates the residual, with the current buffers.
        solver: a differentiable solver.
        params: φ before the first step; all require a gradient.
        state: the solver's state before the first step.
        meta_params: θ.
        steps: numbers of the steps to take.
        residual: `(params, meta_params, step)`, with its graph; None for the evaluation's residual.

    Returns:
        The state after the last step; its params and solver state have their graph.
    """
    at = evaluation.moves
    if residual is not None:
        at = lambda *place: tuple(-r for r in residual(*place))  # noqa: E731

    def velocity(now: Params, step: int) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
        with torch.enable_grad():
            return at(now, meta_params, step), _NO_VALUE

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
    """A solver that takes the same steps in differentiable form.

    Raises:
        ConfigurationError: the solver's steps cannot be differentiated.
    """
    found = solver.recorded()
    if found is None:
        what = getattr(solver, "optimizer", type(solver)).__name__
        raise ConfigurationError(
            f"{who} differentiates the steps of the solver, but those of {what} are not plain "
            f"tensor arithmetic. Use GradientDescent, TorchOptimizer with {_served()}, or an "
            f"estimator that works with any solver"
        )
    return found


def _served() -> str:
    *names, last = (optimizer.__name__ for optimizer in UPDATE_RULES)
    return f"{', '.join(names)} or {last}"
