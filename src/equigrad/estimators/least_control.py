"""The least-control principle: learn so that less and less control is needed."""

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from equigrad.controllers import Controlled, Controller, DynamicInversion
from equigrad.errors import ConfigurationError, SettlingError
from equigrad.estimators.estimator import Estimate, Estimator, Traits
from equigrad.estimators.implicit import POOR
from equigrad.estimators.linearisation import Linearisation, SecondDerivatives
from equigrad.evaluation import Evaluation
from equigrad.fields import Positive, Rule, require
from equigrad.solvers import Anderson, Phase, Solver
from equigrad.vectors import flatten

SAFETY = 3.0
"""Errors are up to about three times the share of the residual that is left."""


@dataclass(frozen=True, kw_only=True)
class LeastControl(Estimator):
    r"""The least-control principle (Meulemans, Zucchet, Kobayashi, von Oswald, Sacramento 2022).

        min_θ min_{φ,ψ} ½‖ψ‖²    such that    velocity(φ, θ) + ψ = 0,    ∂L_out/∂φ = 0

    A controller drives the settled φ to a small outer loss, and θ learns to reduce the control that
    this takes. The gradient is computed at the controlled equilibrium, in one phase, and the
    control need not be small:

        ∇_θ = -(∂_θ velocity)ᵀ ψ* / b + ∂L_out/∂θ

    A controller with a leak relaxes the constraint: φ* is where `½‖r(φ, θ)‖² + b L_out(φ, θ)` is
    stationary, with the residual r = -velocity and the strength b of the control, and ∇_θ is the
    gradient of that minimum, divided by b,

        min_φ [L_out(φ, θ) + ‖r(φ, θ)‖² / 2b]  ≤  L_out(φ*_free, θ),

    exactly for `DynamicInversion` and `EnergyInversion`, with any solver. For b → 0 (weak gains, a
    strong leak) this minimum is the outer loss of the settled φ, and ∇_θ is its gradient, as in
    recurrent backpropagation, with an error of O(b). The division by b makes learning rates
    comparable between all b. Without a leak b is infinite, and ∇_θ is the gradient of `½‖ψ*‖²`
    itself; the outer loss must then have a minimum, or the tolerance of the phase determines φ* and
    ∇_θ. docs/least-control.md has the derivations.

    The `error_estimate` is three times the share of its first residual that the controlled phase
    has left. It is the error as a gradient of that minimum, without the O(b), and too low where
    curvatures differ by orders of magnitude.

    Attributes:
        controller: `DynamicInversion`, `EnergyInversion` or `LinearFeedback`.
        start: the start of the controlled phase. `free` runs and reports a free phase first.
            `params` runs the controlled phase alone: `MetaGradient.params` and `outer_loss` are
            then those of the controlled equilibrium.
        difference: compute the mixed derivative `(∂_θ velocity)ᵀ ψ*` as a central difference of
            `∂L_in/∂θ` between `φ* ± difference ψ*/b`, from first-order gradients. None
            differentiates twice if θ acts through the model of an inner loss, but not if it acts
            only through a regulariser.

    Raises:
        ConfigurationError: from `meta_gradient`, a controller without leak if the outer loss
            depends on θ directly; a difference if there is no inner loss.
        SettlingError: from `meta_gradient`, if learner and controller together are unstable.
        DoubleBackwardError: from `meta_gradient`, if an inner loss has no second derivative.

    Example:
        >>> import torch, equigrad as eg
        >>> problem = eg.FixedPoint(
        ...     map=lambda p, m: {"h": torch.tanh(m["w"] * p["h"] + 0.5)},
        ...     outer_loss=lambda p, m: 0.5 * (p["h"] - 0.8).square().sum(),
        ... )
        >>> result = eg.meta_gradient(
        ...     problem,
        ...     {"h": torch.zeros(1)},
        ...     {"w": torch.tensor(0.1)},
        ...     solver=eg.Picard(tol=1e-6),
        ...     estimator=LeastControl(),
        ... )
        >>> result.grads["w"] < 0  # h is too small without control
        tensor(True)
    """

    traits: ClassVar[Traits] = Traits(
        idea="least control that minimises the outer loss",
        cost="3K + 4",
        error="O(b), b the strength of control",
        double_backward=True,
        energy=False,
        minimum=True,
    )

    controller: Controller = field(default_factory=DynamicInversion)
    start: Literal["free", "params"] = "free"
    difference: Annotated[Positive | None, Rule(remedy="try 1.0")] = None

    def check(self, evaluation: Evaluation, solver: Solver) -> None:
        """Refuse an outer loss with a direct dependence on θ if the controller has no leak."""
        super().check(evaluation, solver)
        require(
            self.difference is None or evaluation.problem.symmetric,
            f"difference={self.difference} needs an inner loss whose ∂L_in/∂θ it can take "
            f"differences of, and a {type(evaluation.problem).__name__} problem has none; use "
            f"difference=None",
        )
        reached = sorted(evaluation.reaches.loss("outer"))
        if reached and not self.controller.relaxed:
            raise ConfigurationError(
                f"{type(self.controller).__name__}(leak=0) minimises the control alone and gives "
                f"the outer loss no weight, but the outer loss depends on meta-parameter "
                f"{reached[0]!r} directly. Use a controller with leak > 0"
            )

    def check_settled(self, evaluation: Evaluation) -> None:
        """Raise if a free phase is given but not used."""
        super().check_settled(evaluation)
        require(
            self.start == "free",
            f"LeastControl(start={self.start!r}) uses no free phase, so it cannot use settled=; "
            f"use start='free', or leave settled out",
        )

    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle under control, and take the mixed derivative along the control."""
        controller = self.controller
        who = f"LeastControl(controller={type(controller).__name__})"
        free = evaluation.settle(solver) if self.start == "free" else None
        try:
            with SecondDerivatives(evaluation, who):
                after = free or evaluation.beginning(controller.solver or solver)
                controlled = controller.control(evaluation, solver, after)
        except SettlingError as error:
            raise SettlingError(
                f"{error}. This phase belongs to {who}, whose controller and learner together are "
                f"unstable. Use a weaker controller: lower gain or proportional, or raise leak"
            ) from error
        settled = controlled.settled
        _, direct = evaluation.outer_gradients(settled)
        mixed = self._mixed(evaluation, controlled, who)
        grads = {n: direct[n] + m if controller.relaxed else m for n, m in mixed.items()}
        grads |= controller.lessons(evaluation, solver, free or settled)
        error, used = _left(settled.phase), controller.solver or solver
        mend = "" if isinstance(used, Anderson) else "solver=Anderson(), "
        mend = f"give the controller {mend}more steps, or less strength (gain, proportional)"
        if settled.phase.failed:
            evaluation.tally.note(
                f"learner and controller have not settled together, so the gradient may be far "
                f"off: {mend}"
            )
        elif error > POOR:
            evaluation.tally.note(
                f"the controlled phase ended before rest, with a residual of "
                f"{settled.phase.residual:.2g} after {settled.phase.start_residual:.2g} at its "
                f"start, so the gradient is wrong by about {error:.1g} of its size: {mend}"
            )
        if free is None:
            evaluation.tally.note(
                "params and outer_loss are those of the controlled phase, because there was no "
                "free phase"
            )
        phases = (settled,) if free is None else (free, settled)
        return Estimate(grads=grads, phases=phases, error_estimate=error)

    def _mixed(self, evaluation: Evaluation, controlled: Controlled, who: str) -> dict[str, Tensor]:
        """`-(∂_θ velocity)ᵀ ψ`, by name of the meta-parameter."""
        settled, control = controlled.settled, controlled.control
        if self.difference is None:
            linear = Linearisation(evaluation, settled, who)
            return linear.mixed(flatten(list(control.values())))
        sides = []
        for step in (self.difference, -self.difference):
            moved = {name: p + step * control[name] for name, p in settled.params.items()}
            sides.append(replace(settled, params=moved))
        weight = 0.5 / self.difference
        # the velocity does not contain the outer loss's contribution by β
        return evaluation.contrast(sides, [weight, -weight], direct={})


def _left(phase: Phase) -> float:
    """Three times the share of its first residual that a phase has left, at most one."""
    if phase.diverged or phase.residual > phase.start_residual:
        return 1.0
    return min(SAFETY * phase.residual / phase.start_residual, 1.0) if phase.residual else 0.0
