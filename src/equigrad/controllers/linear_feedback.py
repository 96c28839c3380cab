"""Linear feedback: the control is a matrix times the output control."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equigrad.controllers.controller import (
    Controlled,
    Controller,
    OutputControl,
    parts,
    prefixed,
)
from equigrad.errors import ConfigurationError
from equigrad.evaluation import Evaluation, no_loss
from equigrad.problems import Params
from equigrad.solvers import Moment, Solver
from equigrad.solvers.rows import rows
from equigrad.solvers.solver import require

Gate = Callable[[Tensor], Tensor]
"""An elementwise function, whose derivative gates what reaches a parameter."""


@dataclass(frozen=True, kw_only=True)
class LinearFeedback(Controller):
    r"""Leads the parameters directly, by fixed or learned feedback weights.

        ψ = g'(φ) ∘ Q U

    with a matrix Q for each parameter. Without any, `ψ = U` on the parameters that the outer loss
    sees: every weight of a learner is pushed by its own pressure, and for an inner loss φ settles
    at a minimum of `L_in + b L_out`. First-order: the phase takes no product with `∂r/∂φ`. The
    control is the least one where `col Q` is that of `(∂r/∂φ)⁻ᵀ (∂h/∂φ)ᵀ` for outputs h(φ), which
    `equigrad.controllers.learn_feedback` leads it to; `column_space_condition` measures it.

    Attributes:
        feedback: Q by name of the parameter: size of the parameter (of one sample) x size of all
            outputs, which are those parameters that the outer loss depends on, in their order.
            Outputs that are not named have `ψ = U`, other parameters no control.
        gate: g, elementwise; the identity where None. For the potentials of neurons it is their
            activation: a saturated neuron cannot act on the output.

    Raises:
        ConfigurationError: from `meta_gradient`, a Q of the wrong shape, or for no parameter.
    """

    feedback: Mapping[str, Tensor] = field(default_factory=dict)
    gate: Gate | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.gate is None or callable(self.gate),
            f"gate must be an elementwise function such as torch.tanh, got {self.gate!r}",
        )

    def control(self, evaluation: Evaluation, solver: Solver, after: Moment) -> Controlled:
        """Settle φ and v."""
        output = OutputControl(self, evaluation, after)
        if self.feedback:
            self._check(after.params, output.outputs, evaluation.problem.samples)
        free, scale = evaluation.free_velocity(), self.scale
        samples = evaluation.problem.samples

        def velocity(state: Params, step: int) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
            params, integral = parts(state, "φ", "v")
            moves, _ = free(params, step)
            push, integrated = output(params, integral, step)
            control = self.spread(params, push, samples)
            along = [
                m + scale * control[name] if name in control else m
                for name, m in zip(params, moves, strict=True)
            ]
            return (*along, *integrated.values()), no_loss

        start = {**prefixed("φ", after.params), **prefixed("v", output.start(after.params))}
        settled = evaluation.settle_controlled(
            velocity,
            start,
            self.solver or solver,
            self.strength,
            after=after,
            gradients=2,
            loss=no_loss,
        )
        ended, integral = parts(settled.params, "φ", "v")
        evaluation.stand_at(settled)
        steps = evaluation.batch_steps("outer")
        control = {name: torch.zeros_like(p) for name, p in ended.items()}
        leaves = {name: p.detach().requires_grad_() for name, p in ended.items()}
        for step in steps:
            push, _ = output(leaves, integral, step)
            for name, c in self.spread(leaves, push, samples).items():
                control[name] += c / len(steps)
        evaluation.gradient_evaluations += len(steps)
        return Controlled(dataclasses.replace(settled, params=ended, solver_state=None), control)

    def spread(self, params: Params, push: Params, samples: bool) -> dict[str, Tensor]:
        """`g'(φ) ∘ Q U` by name, for U by name of the output."""
        control = {name: u for name, u in push.items() if name not in self.feedback}
        if self.feedback:
            flat = rows(list(push.values()), samples)
            for name, q in self.feedback.items():
                control[name] = (flat @ q.T).view_as(params[name])
        return {name: self.gated(params[name], c, name) for name, c in control.items()}

    def gated(self, param: Tensor, control: Tensor, name: str) -> Tensor:
        """`g'(φ) ∘ control` for a parameter that is led by feedback weights."""
        return control * slope_of(self.gate, param) if name in self.feedback else control

    def _check(self, params: Params, outputs: list[str], samples: bool) -> None:
        sizes = {n: p[0].numel() if samples else p.numel() for n, p in params.items()}
        width = sum(sizes[name] for name in outputs)
        for name, q in self.feedback.items():
            if name not in params:
                raise ConfigurationError(
                    f"feedback is given for {name!r}, and the params are "
                    f"{', '.join(map(repr, params))}"
                )
            if q.shape != (sizes[name], width):
                raise ConfigurationError(
                    f"feedback[{name!r}] must be {sizes[name]} x {width}, size of {name!r} x size "
                    f"of the outputs ({', '.join(outputs)}), got {' x '.join(map(str, q.shape))}"
                )


def slope_of(gate: Gate | None, param: Tensor) -> Tensor | float:
    """The derivative of an elementwise function; 1 where there is none."""
    if gate is None:
        return 1.0
    with torch.enable_grad():
        leaf = param.detach().requires_grad_()
        (slope,) = torch.autograd.grad(gate(leaf).sum(), leaf)
    return slope
