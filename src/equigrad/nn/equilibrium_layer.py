"""A layer whose output is the fixed point of a cell."""

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from equigrad.diagnostics.first_look import look
from equigrad.diagnostics.own_weights import Caller
from equigrad.equilibrium import KNOWN_BY_ITS_COTANGENT, Equilibrium
from equigrad.errors import (
    ConfigurationError,
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
from equigrad.results import MetaGradient
from equigrad.solvers import Anderson, Phase, Settled, Solver

Unsettled = Literal["warn", "raise", "ignore"]

OF_A_CELL = Caller(
    moves=False,
    held="Register each parameter of the cell only once",
    changing=(
        "The cell changes from one step of the solver to the next: keep what it changes in "
        "buffers, which are the same for all steps of a pass"
    ),
    state="outside of the cell",
)
"""How messages of the first look refer to a cell."""


class EquilibriumLayer(nn.Module):
    r"""A layer that settles a cell in the forward pass and leaves its gradient to an estimator.

        h* = f(h*, x)

    for a cell `f(h, x)`, where every sample settles for itself. The backward pass asks the
    estimator for the gradient of `⟨∂L/∂h*, h*⟩` with respect to the cell's weights and x. It needs
    no iterates, so that memory does not grow with the solver's steps. The estimator gets the
    cotangent `∂L/∂h*` divided by its largest norm over the samples, so that its β and tolerances do
    not depend on the scale of the loss.

    A cell with an energy declares it by a method `primitive(h, *inputs)`, which returns the scalar
    `Φ(h, x)` summed over samples, and an attribute `activation` ρ, such that
    `f(h, x) = ρ(∂Φ/∂h)`; it needs no `forward`. Estimators that contrast phases then work, too.

    Dropout draws one mask a forward pass, which all solver steps and the backward pass share.
    Buffers that the cell changes in training mode (statistics of batch normalisation, vectors of
    spectral normalisation) stay fixed during all steps; they are updated once a forward pass, by
    one evaluation at the fixed point. Under autocast the cell computes in the lower precision,
    forward and backward, and the solver and estimator compute in the precision of h.

    Args:
        cell: any module or other callable, called as `cell(h, *inputs)`; returns h in its shape.
            The first dimension of h counts the samples. `torch.compile(cell)` works, too. The
            weights of a function are those of the modules that it uses (see
            `equigrad.nn.function_cell.FunctionCell`).
        solver: settles the cell; `tol` bounds the norm of `f(h, x) - h` of a sample.
        estimator: computes the gradient; any that can work at the fixed point of this cell.
        unsettled: what to do if a sample has not settled or has diverged (without a tolerance: if
            the largest residual has more than doubled), or if the estimator reports a problem:
            `warn`, `raise` or `ignore`. A sample that has diverged keeps its initial state and gets
            no gradient. Under `warn`, the first forward pass that fails is reported, with the
            spectral radius, and so is the first such backward pass; `phase` reports every pass.

    Attributes:
        cell: the cell; a `FunctionCell` around a callable that is not a module.
        phase: the report of the last forward pass; its `residuals` are those of the samples, and
            its `unsettled` lists the indices of the samples that have not settled.
        error_estimate: estimated relative error of the gradients of the last backward pass, where
            the estimator provides one, as in `equigrad.MetaGradient`. It covers the estimator's
            own error, not the error that an inexact forward pass causes.
        status: remarks on the last backward pass, in words; empty if there are none.

    Raises:
        ConfigurationError: an argument is invalid, or the estimator does not work with the cell.
        ProblemError: in a forward pass, if the cell changes the shape of h, an input is not
            finite, or a function uses a tensor whose gradient would be missing.
        SettlingError: in a forward pass, if all samples diverge, or if some have not settled and
            `unsettled` is `raise`.

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
                f"{type(self.solver).__name__} compares values of a loss, but a cell has no loss. "
                f"Use Anderson(), Broyden(), Picard() or GradientFlow()"
            )
        _check_serves(self.estimator, cell)
        self.cell = cell
        self.unsettled: Unsettled = unsettled
        self.phase: Phase | None = None
        self.error_estimate: float | None = None
        self.status = ""
        self._looked = False
        self._said: set[str] = set()

    def forward(self, *inputs: Any, start: State | None = None) -> Any:
        """The fixed point of the cell.

        Args:
            inputs: the cell's arguments besides h; lists, tuples and dictionaries may hold tensors.
            start: initial h: a tensor, or a tuple, list or dictionary of tensors. It is treated as
                a constant and gets no gradient. If None, `cell.start(*inputs)` where the cell has
                such a method, else zeros like the first input, in the dtype of the cell's weights.

        Returns:
            h*, in the form of `start`.
        """
        call = Call(self.cell, inputs, self._start(inputs) if start is None else start)
        equilibrium = Equilibrium(
            who=f"EquilibriumLayer({type(self.cell).__name__})",
            problem=call.problem,
            solver=self.solver,
            estimator=self.estimator,
            say=self._say,
            samples=True,
            report=self._report,
            warns_of_error=False,
            look=partial(self._first_look, call),
        )
        with call.full_precision():
            settled, seed = self._settle(call, equilibrium)
        outputs = equilibrium.attach(settled, seed, call.tensors)
        call.tensors = {}  # autograd keeps them for the backward pass, and checks for changes
        return call.shaped(outputs)

    def extra_repr(self) -> str:
        """The solver and the estimator."""
        return f"solver={self.solver},\nestimator={self.estimator},"

    def _start(self, inputs: tuple[Any, ...]) -> State:
        begin: Any = getattr(self.cell, "start", None)
        if begin is not None:
            return begin(*inputs)
        if not (inputs and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point()):
            raise ProblemError(
                "h starts at zeros with the shape of the first input, but that is not a "
                "floating-point tensor. Give start=, or give the cell a method start(*inputs)"
            )
        weight = next((p for p in self.cell.parameters() if p.is_floating_point()), inputs[0])
        return torch.zeros_like(inputs[0], dtype=weight.dtype)

    def _settle(self, call: Call, equilibrium: Equilibrium) -> tuple[Settled, int]:
        """Settle the cell; return the settled state and the seed of its random numbers."""
        theta = {name: t for name, t in call.tensors.items() if t.is_floating_point()}
        with Evaluation(call.problem(call.tensors, theta), call.start, theta) as evaluation:
            call.seed = evaluation.stage.seed
            settled = equilibrium.settle(evaluation)
            self.phase = settled.phase
            equilibrium.judge(evaluation, settled)
        if self.training:
            call.move_buffers(settled.params)
        return settled, call.seed

    def _report(self, result: MetaGradient | None, notes: list[str]) -> None:
        """Keep the results of the backward pass as attributes."""
        self.error_estimate = None if result is None else result.error_estimate
        self.status = "; ".join(notes)

    def _first_look(self, call: Call, problem: Any, settled: Settled, learned: Params) -> list[str]:
        """Check the cell at its fixed point by four evaluations, in the first backward pass."""
        if self._looked:
            return []
        self._looked = True
        called = call.method if kind_of(self.cell) is EnergyBased else self.cell
        problem = dataclasses.replace(problem, modules=(called,))
        with Evaluation(problem, settled.params, learned, settled, call.seed) as evaluation:
            there = dataclasses.replace(settled, buffers=evaluation.stage.snapshot())
            look(evaluation, there, self.estimator, OF_A_CELL)
        return evaluation.tally.notes

    def _say(self, which: str, message: Callable[[], str]) -> None:
        """Raise, or warn the first time, as `unsettled` says."""
        if self.unsettled == "raise":
            raise SettlingError(message())
        if self.unsettled == "warn" and which not in self._said:
            self._said.add(which)
            warnings.warn(message(), SettlingWarning, stacklevel=7)


def _check_serves(estimator: Estimator, cell: nn.Module) -> None:
    """Raise if the estimator cannot compute the backward pass, before anything is computed."""
    kind, who = kind_of(cell), type(cell).__name__
    if kind is EnergyBased and not hasattr(cell, "activation"):
        raise ConfigurationError(
            f"{who} has a method primitive but no activation. Give it the elementwise function ρ "
            f"of h = ρ(∂Φ/∂h), for example activation = staticmethod(torch.tanh)"
        )
    names = " or ".join(f"{e.__name__}()" for e in ESTIMATORS if _serves(e.traits, kind))
    if _serves(estimator.traits, kind):
        return
    if estimator.traits.minimum:
        why = KNOWN_BY_ITS_COTANGENT.format(who="a layer", cotangent="∂L/∂h*", state="h*")
    elif not estimator.traits.equilibrium:
        why = "needs the steps of the solver, but a layer keeps only where they ended"
    elif kind is FixedPoint and not estimator.traits.symmetric:
        why = f"needs an energy, but {who} has no method primitive(h, *inputs) that declares one"
    else:
        why = f"needs a Hessian, but ∂f/∂h of {who} is not symmetric"
    raise ConfigurationError(f"{type(estimator).__name__} {why}; use {names}")


def _serves(traits: Traits, kind: type[Problem]) -> bool:
    """Whether an estimator can work at a fixed point, with the cotangent `∂L/∂h*` for a loss."""
    return traits.equilibrium and not traits.minimum and traits.fit(kind)
