"""The base class of all controllers, and the output control that they share."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from equigrad.evaluation import Evaluation
from equigrad.fields import Checked, NotNegative, require
from equigrad.problems import Params
from equigrad.solvers import Moment, Settled, Solver


@dataclass(frozen=True)
class Controlled:
    """The end of a controlled phase.

    Attributes:
        settled: φ and the report, whose β is the strength of the control.
        control: `ψ/s` by parameter name: what the controller added to the velocity, per unit of its
            `scale` s.
    """

    settled: Settled
    control: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Controller(Checked):
    r"""A controller, which adds a control ψ to the velocity so that the outer loss becomes small.

        τ dφ/dt = velocity(φ, θ) + ψ
        dv/dt = -∂L_out/∂φ - α v,    U = k_i v - k_p ∂L_out/∂φ

    The output control U is a leaky integral of the negative gradient of the outer loss, plus a
    proportional term (Meulemans et al. 2022). At equilibrium `U = -b ∂L_out/∂φ` with the *strength*
    `b = k_i/α + k_p`. Controllers differ in how they compute ψ from U. ψ, v and U are computed per
    unit of b, so that their size, and a tolerance on them, does not depend on b.

    Attributes:
        leak: α ≥ 0. If it is 0, the integral settles only at `∂L_out/∂φ = 0`, which a loss without
            a minimum, such as the cross-entropy, never reaches; the tolerance then determines where
            the phase ends and the size of its control.
        gain: k_i ≥ 0. With the default leak, b = 0.1; the paper has gain 1 and leak 0.1, b = 10.
        proportional: k_p ≥ 0.
        solver: the solver of the controlled phase, whose velocity has one tensor for each of φ
            (`φ.NAME`) and further ones for the controller's state (`ψ.NAME`, `v.NAME`). None for
            the solver of the free phase.

    Raises:
        ConfigurationError: a value is out of range, or all gains are zero.
    """

    leak: NotNegative = 1.0
    gain: NotNegative = 0.1
    proportional: NotNegative = 0.0
    solver: Solver | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.strength > 0,
            "gain and proportional are both 0, so the controller does nothing; set one of them "
            "above 0",
        )

    @property
    def strength(self) -> float:
        """`b = k_i/α + k_p`; infinite without a leak."""
        if self.gain == 0:
            return self.proportional
        return self.proportional + (self.gain / self.leak if self.leak else math.inf)

    @property
    def relaxed(self) -> bool:
        """Whether b is finite, so that control and outer loss are traded off."""
        return self.strength < math.inf

    @property
    def scale(self) -> float:
        """The unit of the control: b, or 1 if b is infinite."""
        return self.strength if self.relaxed else 1.0

    @abstractmethod
    def control(self, evaluation: Evaluation, solver: Solver, after: Moment) -> Controlled:
        """Settle learner and controller together.

        Args:
            evaluation: the problem at its θ.
            solver: solver of the free phase; the controller's own takes precedence.
            after: initial φ, and the buffers that belong to it.
        """

    def lessons(self, evaluation: Evaluation, solver: Solver, at: Settled) -> dict[str, Tensor]:
        """Gradients of meta-parameters that only the controller uses; none by default.

        Args:
            evaluation: the problem at its θ.
            solver: solver of the free phase.
            at: the end of a free or controlled phase.
        """
        return {}


class OutputControl:
    """The output control of a phase: the outer loss's gradient at the outputs, and its integral.

    Args:
        controller: its gains and leak.
        evaluation: evaluates the outer loss.
        after: initial φ, at which the outputs are found: the parameters that the outer loss sees.
    """

    def __init__(self, controller: Controller, evaluation: Evaluation, after: Moment) -> None:
        self._controller, self._after = controller, after
        self._evaluation = evaluation.holding(after)
        self._outputs: list[str] | None = None

    @property
    def outputs(self) -> list[str]:
        """Names of the parameters that the outer loss depends on, found at first access."""
        if self._outputs is None:
            self._evaluation.stage.stand_at(self._after)
            params = {n: p.clone().requires_grad_() for n, p in self._after.params.items()}
            steps = self._evaluation.batch_steps("outer")
            found = set[str]().union(*(self._pressure(params, step) for step in steps))
            self._evaluation.tally.spend(len(steps))
            self._outputs = [name for name in params if name in found]
        return self._outputs

    def start(self, params: Params) -> dict[str, Tensor]:
        """The initial integral, zero, by output name; empty if the controller has no integral."""
        if self._controller.gain == 0:
            return {}
        return {name: torch.zeros_like(params[name]) for name in self.outputs}

    def __call__(
        self, params: Params, integral: Params, step: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`U/s` by output name, and the velocity of the integral."""
        knobs, scale = self._controller, self._controller.scale
        pressure = self._pressure(params, step)
        control = {n: g * (-knobs.proportional / scale) for n, g in pressure.items()}
        moves = {}
        for name, v in integral.items():
            control[name] = control[name].add(v, alpha=knobs.gain / scale)
            moves[name] = pressure[name].neg().sub_(v, alpha=knobs.leak)
        return control, moves

    def _pressure(self, params: Params, step: int) -> dict[str, Tensor]:
        """`∂L_out/∂φ` by output name; while these are unknown, by the names that the loss reaches.

        An output that this mini-batch does not reach has a gradient of zero.
        """
        with torch.enable_grad():
            loss = self._evaluation.evaluate("outer", params, self._evaluation.meta_params, step)
        names = list(params) if self._outputs is None else self._outputs
        leaves = [params[name] for name in names]
        known = self._outputs is not None
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=known)
        return {n: g for n, g in zip(names, grads, strict=True) if g is not None}


def prefixed(prefix: str, tensors: Params) -> dict[str, Tensor]:
    """The tensors under names with a prefix."""
    return {f"{prefix}.{name}": t for name, t in tensors.items()}


def parts(state: Mapping[str, Tensor], *prefixes: str) -> list[dict[str, Tensor]]:
    """The tensors under each prefix, by their names without it."""
    found: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    for name, t in state.items():
        prefix, _, rest = name.partition(".")
        found[prefix][rest] = t
    return list(found.values())
