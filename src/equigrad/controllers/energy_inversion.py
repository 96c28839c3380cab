"""Energy-based dynamic inversion: the learner minimises its own control."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equigrad.controllers.controller import Controlled, Controller, parts, prefixed
from equigrad.evaluation import Evaluation
from equigrad.fields import require
from equigrad.problems import Params, pull_back
from equigrad.solvers import Moment, Solver


@dataclass(frozen=True, kw_only=True)
class EnergyInversion(Controller):
    r"""Minimises the control and the outer loss together; the control is what then is missing.

        φ* minimises  E(φ) = ½‖r(φ, θ)‖² + b L_out(φ),    ψ* = r(φ*, θ)

    with the residual r = -velocity. Its stationary points are the fixed points of
    `DynamicInversion`, and its minima are stable under the flow in continuous time; steps have to
    be short if b or `∂r/∂φ` is large (`GradientFlow(dt=…)`, `Picard(damping=…)`). For a network
    that settles layer by layer, E is the energy of predictive coding. Any solver that minimises
    works, including those that compare values (`LBFGS`).

    The solver moves χ, the distance from the start of the phase per unit of the strength:

        φ = φ₀ + b χ,    dχ/dt = -(∂r/∂φ)ᵀ r/b - ∂L_out/∂φ = -∂/∂χ E(φ₀ + b χ)/b²

    which takes the same steps as the flow of E, with a tolerance on the control per unit of b, as
    in `DynamicInversion`. It is best to start at the free equilibrium
    (`LeastControl(start="free")`): elsewhere r is also the residual that has not settled yet, and
    `r/b` is taken for control until the phase has settled.

    Raises:
        ConfigurationError: leak = 0, which makes b infinite; from `meta_gradient`, inner
            mini-batches, whose squared residuals do not average.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.strength < math.inf,
            "EnergyInversion weighs the outer loss by gain / leak, which is infinite for leak=0. "
            "Use a small leak, or DynamicInversion(leak=0)",
        )

    def control(self, evaluation: Evaluation, solver: Solver, after: Moment) -> Controlled:
        """Minimise over φ."""
        evaluation = evaluation.holding(after)
        batches = len(evaluation.batch_steps("inner"))
        require(
            batches == 1,
            f"EnergyInversion squares the residual, and the mean of squares over {batches} "
            f"mini-batches is not the square of the mean. Use DynamicInversion(), or average over "
            f"the mini-batches in the inner loss or map",
        )
        residual, strength, start = evaluation.residual_at(), self.strength, after.params
        meta = evaluation.meta_params

        def place(state: Params) -> dict[str, Tensor]:
            """φ₀ + b χ, with respect to which a residual can be differentiated."""
            (moved,) = parts(state, "φ")
            return {
                name: p.detach().add(moved[name].detach(), alpha=strength).requires_grad_()
                for name, p in start.items()
            }

        def terms(params: Params, step: int) -> tuple[tuple[Tensor, ...], Tensor]:
            with torch.enable_grad():
                return residual(params, step), evaluation.evaluate("outer", params, meta, step)

        def energy(rest: tuple[Tensor, ...], outer: Tensor) -> Tensor:
            squares = torch.stack([r.detach().square().sum() for r in rest]).sum()
            return 0.5 * squares / strength**2 + outer.detach() / strength

        def velocity(state: Params, step: int) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
            params = place(state)
            rest, outer = terms(params, step)
            control = [r.detach() / -strength for r in rest]
            pushes = torch.full_like(outer, -1)
            moves = pull_back([*rest, outer], [*control, pushes], list(params.values()))
            return moves, lambda: energy(rest, outer)

        settled = evaluation.settle_controlled(
            velocity,
            prefixed("φ", {name: torch.zeros_like(p) for name, p in start.items()}),
            self.solver or solver,
            strength,
            after=after,
            gradients=3,
            loss=lambda state, step: energy(*terms(place(state), step)),
        )
        ended = place(settled.params)
        with torch.enable_grad():
            rest = residual(ended, settled.end_step)
        evaluation.tally.spend(1)
        control = {name: r.detach() / strength for name, r in zip(ended, rest, strict=True)}
        params = {name: p.detach() for name, p in ended.items()}
        return Controlled(dataclasses.replace(settled, params=params, solver_state=None), control)
