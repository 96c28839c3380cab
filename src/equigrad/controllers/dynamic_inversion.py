"""Dynamic inversion: the control settles a linear system beside the learner."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equigrad.controllers.controller import (
    Controlled,
    Controller,
    OutputControl,
    parts,
    prefixed,
)
from equigrad.evaluation import Evaluation, no_loss
from equigrad.problems import Params, pull_back
from equigrad.solvers import Moment, Solver


@dataclass(frozen=True, kw_only=True)
class DynamicInversion(Controller):
    r"""Leads every parameter by the output control, pulled back through the learner.

        dψ/dt = U - (∂r/∂φ)ᵀ ψ,    for a map  dψ/dt = (∂F/∂φ)ᵀ ψ - ψ + U

    with the residual r = -velocity at φ as it now is (Meulemans et al. 2022). At rest
    `ψ = (∂r/∂φ)⁻ᵀ U`, so that ψ satisfies the optimality condition of the least-control principle
    exactly, and φ is a stationary point of `½‖r(φ, θ)‖² + b L_out(φ)`. Neither a second phase nor
    weights of a backward path: one product with the transposed Jacobian a step, which for a map is
    a backward pass and for a loss differentiates its gradient once more.

    Raises:
        DoubleBackwardError: from `meta_gradient`, where an inner loss has no second derivative.
    """

    def control(self, evaluation: Evaluation, solver: Solver, after: Moment) -> Controlled:
        """Settle φ, ψ and v."""
        evaluation = evaluation.holding(after)
        output = OutputControl(self, evaluation, after)
        residual, scale = evaluation.residual_at(), self.scale

        def velocity(state: Params, step: int) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
            params, control, integral = parts(state, "φ", "ψ", "v")
            with torch.enable_grad():
                rest = residual(params, step)
            pulled = list(control.values())
            if any(c.any() for c in pulled):  # at the start there is no control to be pulled back
                pulled = pull_back(rest, pulled, list(params.values()))
            push, integrated = output(params, integral, step)
            along = [
                c.mul(scale).sub_(r.detach()) for c, r in zip(control.values(), rest, strict=True)
            ]
            lead = [
                push[name] - back if name in push else -back
                for name, back in zip(params, pulled, strict=True)
            ]
            return (*along, *lead, *integrated.values()), no_loss

        params = after.params
        start = {
            **prefixed("φ", params),
            **prefixed("ψ", {name: torch.zeros_like(p) for name, p in params.items()}),
            **prefixed("v", output.start(params)),
        }
        settled = evaluation.settle_controlled(
            velocity,
            start,
            self.solver or solver,
            self.strength,
            after=after,
            gradients=3,
            loss=no_loss,
        )
        ended, control, _ = parts(settled.params, "φ", "ψ", "v")
        return Controlled(dataclasses.replace(settled, params=ended, solver_state=None), control)
