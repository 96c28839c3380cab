"""Energy-based dynamic inversion: the learner minimises its own control."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equigrad.controllers.controller import Controlled, Controller, parts, prefixed
from equigrad.evaluation import Evaluation
from equigrad.problems import Params, pull_back
from equigrad.solvers import Moment, Solver
from equigrad.solvers.solver import require


@dataclass(frozen=True, kw_only=True)
class EnergyInversion(Controller):
    r"""Minimises the control and the outer loss together; the control is what then is missing.

        φ* minimises  ½‖r(φ, θ)‖² + b L_out(φ),    ψ* = r(φ*, θ)

    with the residual r = -velocity. Its stationary points are the fixed points of
    `DynamicInversion`, and its minima are never unstable under the flow in continuous time; steps
    have to be short where b or `∂r/∂φ` is large (`GradientFlow(dt=…)`, `Picard(damping=…)`). Of a
    network that is settled layer by layer, it is the energy of predictive coding. Any solver that
    minimises will do, also those that compare values (`LBFGS`).

    Raises:
        ConfigurationError: leak = 0, which makes b infinite; from `meta_gradient`, mini-batches of
            what settles, whose squares do not average.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.strength < math.inf,
            "EnergyInversion weighs the outer loss by gain/leak, and leak=0 makes that infinite; "
            "take a small leak, or DynamicInversion(leak=0)",
        )

    def control(self, evaluation: Evaluation, solver: Solver, after: Moment) -> Controlled:
        """Minimise over φ."""
        batches = len(evaluation.batch_steps("inner"))
        require(
            batches == 1,
            f"EnergyInversion squares the residual, and a mean over {batches} mini-batches of "
            f"squares is not the square of the mean; use DynamicInversion(), or average the "
            f"batches in one function",
        )
        residual, strength = evaluation.residual_at(), self.strength
        meta = evaluation.meta_params

        def energy(params: Params, step: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
            (params,) = parts(params, "φ")
            with torch.enable_grad():
                rest = residual(params, step)
                outer = evaluation.evaluate("outer", params, meta, step)
            squares = torch.stack([r.detach().square().sum() for r in rest]).sum()
            return rest, outer, 0.5 * squares + strength * outer.detach()

        def velocity(state: Params, step: int) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
            rest, outer, value = energy(state, step)
            seeds = [-r.detach() for r in rest]
            pushes = torch.full_like(outer, -strength)
            moves = pull_back([*rest, outer], [*seeds, pushes], list(state.values()))
            return moves, lambda: value

        settled = evaluation.settle_controlled(
            velocity,
            prefixed("φ", after.params),
            self.solver or solver,
            strength,
            after=after,
            gradients=3,
            loss=lambda params, step: energy(_leaves(params), step)[2],
        )
        (ended,) = parts(settled.params, "φ")
        with torch.enable_grad():
            rest = residual(_leaves(ended), settled.end_step)
        evaluation.gradient_evaluations += 1
        control = {name: r.detach() / self.scale for name, r in zip(ended, rest, strict=True)}
        return Controlled(dataclasses.replace(settled, params=ended, solver_state=None), control)


def _leaves(params: Params) -> dict[str, Tensor]:
    """The same numbers, which a residual can be differentiated by."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}
