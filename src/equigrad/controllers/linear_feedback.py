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
from equigrad.controllers.noise import Gate, correlate, powers, slope_of
from equigrad.errors import ConfigurationError
from equigrad.evaluation import Evaluation, no_loss
from equigrad.fields import Count, Positive
from equigrad.problems import Params
from equigrad.solvers import Moment, Settled, Solver
from equigrad.solvers.rows import rows


@dataclass(frozen=True, kw_only=True)
class LinearFeedback(Controller):
    r"""A controller that acts on all parameters directly, by fixed or learned feedback weights.

        ψ = g'(φ) ∘ Q U

    with a matrix Q for each parameter. Without any Q, `ψ = U` on the parameters that the outer loss
    depends on, and for an inner loss φ settles at a minimum of `L_in + b L_out`. The method is
    first-order: the phase takes no product with `∂r/∂φ`. The control is the least one if Q has the
    column space of `(∂r/∂φ)⁻ᵀ (∂h/∂φ)ᵀ` for outputs h(φ); `equigrad.controllers.learn_feedback`
    learns such a Q, and `column_space_condition` measures how close it is.

    Q may itself be a part of θ and be learned together with the weights. Its gradient is then that
    of

        Σ_samples ½‖g' ∘ Q - ξ (δh)ᵀ/σ²‖²

    with noise ξ on the params and its effect δh on the outputs, as in `learn_feedback`. Descending
    it averages over mini-batches and follows the weights.

    Attributes:
        feedback: Q by parameter name, of shape (size of the parameter for one sample) x (size of
            all outputs). Outputs are the parameters that the outer loss depends on, in their order.
            Outputs without a Q have `ψ = U`; other parameters without one have no control. A string
            WORD instead makes Q of the parameter NAME the meta-parameter `WORD.NAME`, which learns.
        gate: g, elementwise; None for the identity. For membrane potentials it is the neurons'
            activation function: a saturated neuron cannot act on the output.
        noise: σ of the noise from which a Q in θ is learned.
        draws: number of draws of ξ for a gradient, each of which is used with both signs.

    Raises:
        ConfigurationError: a value is out of range; from `meta_gradient`, a Q has the wrong shape
            or no parameter of its name, or θ has no Q under the given word.
    """

    feedback: Mapping[str, Tensor] | str = field(default_factory=dict)
    gate: Gate | None = None
    noise: Positive = 1e-2
    draws: Count = 1

    def control(self, evaluation: Evaluation, solver: Solver, after: Moment) -> Controlled:
        """Settle φ and v."""
        evaluation = evaluation.holding(after)
        output = OutputControl(self, evaluation, after)
        samples, feedback = evaluation.problem.samples, self.weights(evaluation.meta_params)
        if feedback:
            _check(feedback, after.params, output.outputs, samples)
        free, scale = evaluation.velocity(), self.scale

        def velocity(state: Params, step: int) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
            params, integral = parts(state, "φ", "v")
            moves, _ = free(params, step)
            push, integrated = output(params, integral, step)
            control = self._spread(feedback, params, push, samples)
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
        evaluation.stage.stand_at(settled)
        steps = evaluation.batch_steps("outer")
        control = {name: torch.zeros_like(p) for name, p in ended.items()}
        leaves = {name: p.detach().requires_grad_() for name, p in ended.items()}
        for step in steps:
            push, _ = output(leaves, integral, step)
            for name, c in self._spread(feedback, leaves, push, samples).items():
                control[name] += c / len(steps)
        evaluation.tally.spend(len(steps))
        return Controlled(dataclasses.replace(settled, params=ended, solver_state=None), control)

    def lessons(self, evaluation: Evaluation, solver: Solver, at: Settled) -> dict[str, Tensor]:
        """The gradients of every Q in θ."""
        if not isinstance(self.feedback, str):
            return {}
        feedback, samples = self.weights(evaluation.meta_params), evaluation.problem.samples
        outputs = OutputControl(self, evaluation, at).outputs
        gates = {name: slope_of(self.gate, at.params[name]) for name in feedback}
        moved = correlate(
            evaluation,
            solver,
            at,
            outputs,
            gates,
            noise=self.noise,
            draws=self.draws,
            seed=evaluation.stage.seed,
        )
        count = len(next(iter(gates.values()))) if samples else 1
        return {
            f"{self.feedback}.{name}": count * (power * feedback[name] - moved[name])
            for name, power in powers(gates, samples).items()
        }

    def weights(self, meta_params: Params) -> Mapping[str, Tensor]:
        """Q by parameter name.

        Raises:
            ConfigurationError: feedback is a word, and θ has no Q under it.
        """
        if not isinstance(self.feedback, str):
            return self.feedback
        word = f"{self.feedback}."
        found = {n.removeprefix(word): m for n, m in meta_params.items() if n.startswith(word)}
        if not found:
            raise ConfigurationError(
                f"feedback={self.feedback!r} means the meta-parameters whose names begin with "
                f"{word!r}, but there are none; meta_params has "
                f"{', '.join(map(repr, meta_params))}"
            )
        return found

    def _spread(
        self, feedback: Params, params: Params, push: Params, samples: bool
    ) -> dict[str, Tensor]:
        """`g'(φ) ∘ Q U` by name, for U by output name."""
        control = {name: u for name, u in push.items() if name not in feedback}
        if feedback:
            flat = rows(list(push.values()), samples)
            for name, q in feedback.items():
                led = (flat @ q.T).view_as(params[name])
                control[name] = (
                    led if self.gate is None else slope_of(self.gate, params[name]) * led
                )
        return control


def _check(feedback: Params, params: Params, outputs: list[str], samples: bool) -> None:
    sizes = {n: p[0].numel() if samples else p.numel() for n, p in params.items()}
    width = sum(sizes[name] for name in outputs)
    for name, q in feedback.items():
        if name not in params:
            raise ConfigurationError(
                f"feedback has weights for {name!r}, which is not one of the params: "
                f"{', '.join(map(repr, params))}"
            )
        if q.shape != (sizes[name], width):
            raise ConfigurationError(
                f"feedback[{name!r}] must have shape {sizes[name]} x {width}, the size of {name!r} "
                f"x the size of the outputs ({', '.join(outputs)}), got "
                f"{' x '.join(map(str, q.shape))}"
            )
