"""Dynamic inversion: the control solves a linear system while the learner settles."""

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

    with the residual r = -velocity at the current φ (Meulemans et al. 2022). At equilibrium
    `ψ = (∂r/∂φ)⁻ᵀ U`, so that ψ satisfies the optimality condition of the least-control principle
    exactly, and φ is a stationary point of `½‖r(φ, θ)‖² + b L_out(φ)`. It needs no second phase and
    no backward weights, but one product with the transposed Jacobian in each step: a backward pass
    for a map, a second derivative for a loss.

    Raises:
        DoubleBackwardError: from `meta_gradient`, if an inner loss has no second derivative.
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
            if any(c.any() for c in pulled):  # the control is zero at the start
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
