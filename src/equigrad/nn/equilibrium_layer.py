"""A layer whose output is where a cell settles."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from equigrad.diagnostics.contraction import explained, verdict
from equigrad.errors import (
    ConfigurationError,
    DoubleBackwardError,
    ProblemError,
    SettlingError,
    SettlingWarning,
)
from equigrad.estimators import ESTIMATORS, Adjoint, Estimator
from equigrad.estimators.estimator import Traits
from equigrad.evaluation import Evaluation
from equigrad.fields import expect
from equigrad.nn.equilibrium_call import Call, State, kind_of
from equigrad.nn.function_cell import as_cell
from equigrad.problems import EnergyBased, FixedPoint, Params, Problem
from equigrad.solvers import Anderson, Phase, Settled, Solver
from equigrad.solvers.rows import rows

Unsettled = Literal["warn", "raise", "ignore"]


class EquilibriumLayer(nn.Module):
    r"""Settles a cell, and hands its gradient to an estimator.

        h* = f(h*, x)

    for a cell `f(h, x)`, sample by sample. The backward pass asks the estimator for the gradient of
    `⟨∂L/∂h*, h*⟩` by the cell's weights and by x; nothing of the settling is kept for it, so that
    memory does not grow with the solver's steps. Estimators see `∂L/∂h*` divided by the largest
    norm of it of a sample: their β and their tolerances do not depend on how the loss is scaled.

    A cell that has an energy declares it by a method `primitive(h, *inputs)`, the scalar
    `Φ(h, x)` summed over samples, and an attribute `activation` ρ, such that
    `f(h, x) = ρ(∂Φ/∂h)`; it needs no `forward`. Then estimators that contrast phases serve it, too.

    Dropout draws one mask a forward pass, which is the same at every step of the solver and in the
    backward pass. So are buffers that the cell changes in training mode (statistics of batch
    normalisation, vectors of spectral normalisation): all steps see them as they were before, and
    they move once a forward pass, as if the cell were evaluated once, where it has settled. Under
    autocast the cell computes in the lower precision, forward and backward, and all that surrounds
    it in that of h.

    Args:
        cell: any module, or any other callable, called as `cell(h, *inputs)`; returns h in its
            shape. The first dimension of h is one of samples. `torch.compile(cell)` will do, too.
            The weights of a function are those of the modules that it uses (see
            `equigrad.nn.function_cell.FunctionCell`).
        solver: settles the cell; `tol` is that of the norm of `f(h, x) - h` of a sample.
        estimator: how the gradient is had; any that serves the cell where it has settled.
        unsettled: what to do where a sample has not settled or has diverged (without a tolerance:
            where the largest residual has more than doubled), or the estimator has something to
            say: `warn`, `raise` or `ignore`. A sample that has diverged is left where it started,
            and gets no gradient. Under `warn`, the first forward pass that fails says so,
            with the spectral radius, and the first such backward pass; `phase` says it of every
            pass.

    Attributes:
        cell: the cell; a `FunctionCell` around what is no module.
        phase: the report of the last forward pass; its `residuals` are those of the samples and its
            `unsettled` the numbers of those that have not settled.

    Raises:
        ConfigurationError: an argument is not what it has to be, or the estimator cannot serve the
            cell.
        ProblemError: from a forward pass, where the cell changes the shape of h, or an input is not
            finite, or a function uses a tensor whose gradient would be missing.
        SettlingError: from a forward pass in which all samples diverge, or some have not settled
            under `raise`.

    Example:
        >>> import torch, equigrad as eg
        >>> class Cell(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(3, 3)
        ...     def forward(self, h, x):
        ...         return torch.tanh(0.5 * self.linear(h) + x)
        >>> net = torch.nn.Sequential(eg.nn.EquilibriumLayer(Cell()), torch.nn.Linear(3, 1))
        >>> net(torch.randn(8, 3)).sum().backward()
        >>> net[0].phase.outcome
        'converged'
    """

    def __init__(
        self,
        cell: Callable[..., Any],
        *,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        unsettled: Unsettled = "warn",
    ) -> None:
        super().__init__()
        self.solver = Anderson(tol=1e-4, max_steps=100) if solver is None else solver
        self.estimator = Adjoint() if estimator is None else estimator
        cell = as_cell(cell)
        expect(Solver, solver=self.solver)
        expect(Estimator, estimator=self.estimator)
        expect(Unsettled, unsettled=unsettled)
        if self.solver.fixed_loss:
            raise ConfigurationError(
                f"{type(self.solver).__name__} looks at values of a loss, and a cell has none; "
                f"use Anderson(), Broyden(), Picard() or GradientFlow()"
            )
        _check_serves(self.estimator, cell)
        self.cell = cell
        self.unsettled: Unsettled = unsettled
        self.phase: Phase | None = None
        self._said: set[str] = set()

    def forward(self, *inputs: Any, start: State | None = None) -> Any:
        """Where the cell settles.

        Args:
            inputs: what the cell takes beside h; tensors also in lists, tuples and dictionaries.
            start: h to start from: a tensor, or a tuple, list or dictionary of tensors. It has no
                influence on what settles, and gets no gradient. Where None, what
                `cell.start(*inputs)` gives if there is such a method, else zeros like the first
                input, in the dtype of the cell's weights.

        Returns:
            h as `start` has it.
        """
        call = Call(self.cell, inputs, self._start(inputs) if start is None else start)
        with call.full_precision():
            settled = self._settle(call)
        outputs = _Equilibrium.apply(self, call, settled, *call.tensors.values())
        call.tensors = {}  # autograd keeps what backward needs, and sees to it that it is unchanged
        return call.shaped(dict(zip(settled.params, outputs, strict=True)))

    def extra_repr(self) -> str:
        """Solver and estimator."""
        return f"solver={self.solver},\nestimator={self.estimator},"

    def _start(self, inputs: tuple[Any, ...]) -> State:
        begin: Any = getattr(self.cell, "start", None)
        if begin is not None:
            return begin(*inputs)
        if not (inputs and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point()):
            raise ProblemError(
                "h starts at zeros like the first input, and that is no tensor of floating-point "
                "numbers; give start=, or the cell a method start(*inputs)"
            )
        weight = next((p for p in self.cell.parameters() if p.is_floating_point()), inputs[0])
        return torch.zeros_like(inputs[0], dtype=weight.dtype)

    def _settle(self, call: Call) -> Settled:
        """Settle the cell, and see to it that nothing is silent."""
        who = f"EquilibriumLayer({type(self.cell).__name__})"
        theta = {name: t for name, t in call.tensors.items() if t.is_floating_point()}
        with Evaluation(call.problem(call.tensors, theta), call.start, theta) as evaluation:
            call.seed = evaluation.stage.seed
            try:
                settled = evaluation.settle(self.solver)
            except SettlingError as error:
                raise explained(error, evaluation, who) from error
            self.phase = phase = settled.phase
            if phase.failed:
                self._say(
                    "forward", lambda: f"{who} {phase}; {verdict(evaluation, settled, self.solver)}"
                )
        if self.training:
            call.move_buffers(settled.params)
        return settled

    def gradients(
        self, call: Call, settled: Settled, tensors: Params, learned: Params, pressure: Params
    ) -> dict[str, Tensor]:
        """What the estimator says of `⟨pressure, h*⟩`, by name of what is learned.

        Args:
            call: the forward pass.
            settled: where it ended.
            tensors: its weights and inputs.
            learned: those of them that want a gradient.
            pressure: `∂L/∂h*`, by name.
        """
        size = rows(list(pressure.values()), samples=True).norm(dim=1).max().item()
        if not 0 < size < math.inf:  # no gradient, or one that overflowed: what scales it will see
            return {name: torch.full_like(t, size and math.nan) for name, t in learned.items()}
        unit = {name: p / size for name, p in pressure.items()}
        problem = call.problem(tensors, learned, unit)
        with (
            call.full_precision(),
            Evaluation(problem, settled.params, learned, settled, call.seed) as evaluation,
        ):
            self.estimator.check(evaluation, self.solver)
            estimate = self.estimator.estimate(evaluation, self.solver)
        notes = [
            f"phase β={phase.beta:g} {phase}"
            for phase in (other.phase for other in estimate.phases[1:])
            if phase.failed
        ] + evaluation.tally.notes
        if notes:
            who = f"the backward pass of EquilibriumLayer({type(self.cell).__name__})"
            self._say("backward", lambda: f"{who}: {'; '.join(notes)}")
        return {name: size * grad for name, grad in estimate.grads.items()}

    def _say(self, which: str, message: Callable[[], str]) -> None:
        """Raise, or warn the first time, as `unsettled` asks for."""
        if self.unsettled == "raise":
            raise SettlingError(message())
        if self.unsettled == "warn" and which not in self._said:
            self._said.add(which)
            warnings.warn(message(), SettlingWarning, stacklevel=6)


def _check_serves(estimator: Estimator, cell: nn.Module) -> None:
    """Refuse what backward could not do, before anything is computed."""
    kind, who = kind_of(cell), type(cell).__name__
    if kind is EnergyBased and not hasattr(cell, "activation"):
        raise ConfigurationError(
            f"{who} has a primitive function but no activation: give it the elementwise function "
            f"ρ of h = ρ(∂Φ/∂h), for example activation = staticmethod(torch.tanh)"
        )
    names = " or ".join(f"{e.__name__}()" for e in ESTIMATORS if _serves(e.traits, kind))
    if _serves(estimator.traits, kind):
        return
    if estimator.traits.minimum:
        why = (
            "needs an outer loss that has a minimum, and a layer knows its loss by ∂L/∂h* alone, "
            "as a linear function of h*, which has none"
        )
    elif not estimator.traits.equilibrium:
        why = "looks at the steps of a settling, and a layer keeps where it ended alone"
    elif kind is FixedPoint and not estimator.traits.symmetric:
        why = f"needs an energy, and {who} declares none by a method primitive(h, *inputs)"
    else:
        why = f"needs a Hessian, and ∂f/∂h of {who} is none"
    raise ConfigurationError(f"{type(estimator).__name__} {why}; use {names}")


def _serves(traits: Traits, kind: type[Problem]) -> bool:
    """Whether an estimator can work where a cell has settled, with `∂L/∂h*` for a loss."""
    return traits.equilibrium and not traits.minimum and traits.fit(kind)


class _Equilibrium(torch.autograd.Function):
    """The settled state as a function of weights and inputs."""

    @staticmethod
    def forward(
        ctx: Any, layer: EquilibriumLayer, call: Call, settled: Settled, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = tuple(settled.params.values())
        # the solver's state may be many times larger than h
        ended = dataclasses.replace(settled, params={}, solver_state=None)
        ctx.layer, ctx.call, ctx.settled = layer, call, ended
        ctx.names = list(settled.params), list(call.tensors)
        ctx.save_for_backward(*outputs, *tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *pressures: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        state, names = ctx.names
        saved = ctx.saved_tensors
        params = {name: h.detach() for name, h in zip(state, saved, strict=False)}
        tensors = dict(zip(names, saved[len(state) :], strict=True))
        needed = ctx.needs_input_grad[3:]
        learned = {n: t for (n, t), need in zip(tensors.items(), needed, strict=True) if need}
        with torch.no_grad():
            grads = ctx.layer.gradients(
                ctx.call,
                dataclasses.replace(ctx.settled, params=params),
                tensors,
                learned,
                dict(zip(state, pressures, strict=True)),
            )
        if torch.is_grad_enabled():  # create_graph=True
            grads = {n: _OnceOnly.apply(g, *learned.values(), *pressures) for n, g in grads.items()}
        return None, None, None, *(grads.get(name) for name in names)


class _OnceOnly(torch.autograd.Function):
    """A gradient that looks as if it could be differentiated, and says that it cannot."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore
        raise DoubleBackwardError(
            "the gradient of an EquilibriumLayer is an estimate that cannot be differentiated once "
            "more; leave out create_graph=True, or the penalty on this gradient"
        )
