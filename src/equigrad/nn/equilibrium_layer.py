"""A layer whose output is where a cell settles."""

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from equigrad.contraction import verdict
from equigrad.errors import ConfigurationError, ProblemError, SettlingError, SettlingWarning
from equigrad.estimators import Adjoint, Estimator
from equigrad.evaluation import Evaluation
from equigrad.problems import EnergyBased, FixedPoint, Params, Problem
from equigrad.randomness import Stream
from equigrad.solvers import Anderson, Phase, Settled, Solver


class EquilibriumLayer(nn.Module):
    r"""Settles a cell, and hands its gradient to an estimator.

        h* = f(h*, x)

    for a cell `f(h, x)`, sample by sample. The backward pass asks the estimator for the gradient of
    `⟨∂L/∂h*, h*⟩` by the cell's weights and by x; nothing of the settling is kept for it, so that
    memory does not grow with the solver's steps.

    A cell that has an energy declares it by a method `primitive(h, *inputs)`, the scalar
    `Φ(h, x)` summed over samples, and an attribute `activation` ρ, such that
    `f(h, x) = ρ(∂Φ/∂h)`. Then estimators that contrast phases serve it, too.

    Args:
        cell: any module, called as `cell(h, *inputs)`; returns the shape of h. The first dimension
            of h is one of samples.
        solver: settles the cell; `tol` is that of the norm of `f(h, x) - h` of a sample.
        estimator: how the gradient is had; any that serves the cell.
        unsettled: what to do where a sample has not settled: `warn`, `raise` or `ignore`. Under
            `warn`, the first forward pass that fails says so, with the spectral radius.

    Attributes:
        cell: the cell.
        phase: the report of the last forward pass.

    Raises:
        ConfigurationError: an argument is not what it has to be.
        ProblemError: from a forward pass, where the cell changes the shape of h.
        SettlingError: from a forward pass that diverges, or has not settled under `raise`.

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
        cell: nn.Module,
        *,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        unsettled: Literal["warn", "raise", "ignore"] = "warn",
    ) -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise ConfigurationError(f"cell must be a torch.nn.Module, got {cell!r}")
        if unsettled not in ("warn", "raise", "ignore"):
            raise ConfigurationError(
                f"unsettled must be 'warn', 'raise' or 'ignore', got {unsettled!r}"
            )
        self.cell = cell
        self.solver = Anderson(tol=1e-4, max_steps=100) if solver is None else solver
        self.estimator = Adjoint() if estimator is None else estimator
        self.unsettled = unsettled
        self.phase: Phase | None = None
        self._warned = False

    def forward(self, *inputs: Any, start: Tensor | None = None) -> Tensor:
        """Where the cell settles.

        Args:
            inputs: what the cell takes beside h.
            start: h to start from; where None, what `cell.start(*inputs)` gives if there is such a
                method, else zeros like the first input.
        """
        if start is None:
            begin = getattr(self.cell, "start", None)
            start = torch.zeros_like(inputs[0]) if begin is None else begin(*inputs)
        assert isinstance(start, Tensor)
        weights: dict[str, Tensor] = dict(self.cell.named_parameters())
        given = {f"input.{i}": x for i, x in enumerate(inputs) if isinstance(x, Tensor)}
        call = _Call(self, inputs, weights, given, start)
        return _Equilibrium.apply(call, *weights.values(), *given.values())  # pyright: ignore

    def extra_repr(self) -> str:
        """Solver and estimator."""
        return f"solver={self.solver},\nestimator={self.estimator},"


class _Call:
    """One forward pass, and what its backward pass needs."""

    def __init__(
        self,
        layer: EquilibriumLayer,
        inputs: tuple[Any, ...],
        weights: dict[str, Tensor],
        given: dict[str, Tensor],
        start: Tensor,
    ) -> None:
        self.layer, self.inputs = layer, inputs
        self.weights, self.start = weights, start.detach()
        self.tensors = {**weights, **given}
        self.learned = [
            name for name, t in self.tensors.items() if t.is_floating_point() and t.requires_grad
        ]
        self.settled: Settled | None = None

    def problem(self, meta_params: Params, pressure: Tensor | None = None) -> Problem:
        """The cell as a problem, judged by `⟨pressure, h⟩`."""
        cell: Any = self.layer.cell
        reaches: dict[Stream, list[str]] = {"inner": list(meta_params), "outer": []}

        def outer_loss(params: Params, meta: Params) -> Tensor:
            assert pressure is not None
            return (params["h"] * pressure).sum()

        if hasattr(cell, "primitive"):
            return EnergyBased(
                lambda params, meta: self.call("primitive", params["h"], meta),
                outer_loss,
                activation=cell.activation,
                modules=(cell,),
                reaches=reaches,
                samples=True,
            )
        return FixedPoint(
            lambda params, meta: {"h": self.call("forward", params["h"], meta)},
            outer_loss,
            modules=(cell,),
            reaches=reaches,
            samples=True,
        )

    def call(self, method: str, h: Tensor, meta: Params) -> Tensor:
        """The cell with the weights and inputs that `meta` holds, and its own for the others."""
        inputs = [meta.get(f"input.{i}", x) for i, x in enumerate(self.inputs)]
        cell = self.layer.cell
        changed = {n: meta[n] for n in self.weights if n in meta and meta[n] is not self.weights[n]}
        if changed and method == "forward":
            return functional_call(cell, changed, (h, *inputs))
        if changed:
            return functional_call(_Method(cell, method), _prefixed(changed), (h, *inputs))
        return getattr(cell, method)(h, *inputs)

    def settle(self) -> Tensor:
        """Settle the cell, and see to it that nothing is silent."""
        layer = self.layer
        problem, params = self.problem(self.tensors), {"h": self.start}
        with Evaluation(problem, params, self.tensors) as evaluation:
            image = self.call("forward", self.start, {})
            if image.shape != self.start.shape:
                raise ProblemError(
                    f"the cell must return h in its shape {tuple(self.start.shape)}, got "
                    f"{tuple(image.shape)}; give another start"
                )
            try:
                self.settled = evaluation.settle(layer.solver)
            except SettlingError as error:
                raise SettlingError(f"{error}") from error
            layer.phase = phase = self.settled.phase
            fails = phase.outcome in ("not converged", "stalled") and layer.unsettled != "ignore"
            if fails and not (layer.unsettled == "warn" and layer._warned):
                message = (
                    f"EquilibriumLayer({type(layer.cell).__name__}) {phase}; "
                    f"{verdict(evaluation, self.settled)}"
                )
                if layer.unsettled == "raise":
                    raise SettlingError(message)
                layer._warned = True
                warnings.warn(message, SettlingWarning, stacklevel=5)
        return self.settled.params["h"].clone()  # the output gets a graph

    def gradients(self, pressure: Tensor) -> list[Tensor | None]:
        """What the estimator says, one tensor for each of the function's."""
        assert self.settled is not None
        meta = {name: self.tensors[name] for name in self.learned}
        problem, solver = self.problem(meta, pressure), self.layer.solver
        with Evaluation(problem, self.settled.params, meta, self.settled) as evaluation:
            self.layer.estimator.check(evaluation, solver)
            grads = self.layer.estimator.estimate(evaluation, solver).grads
        return [grads.get(name) for name in self.tensors]


class _Method(nn.Module):
    """A module's method as its forward pass."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *inputs: Any) -> Any:
        return getattr(self.module, self.method)(*inputs)


def _prefixed(weights: Params) -> dict[str, Tensor]:
    return {f"module.{name}": w for name, w in weights.items()}


class _Equilibrium(torch.autograd.Function):
    """The settled state as a function of weights and inputs."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:
        ctx.call = call
        return call.settle()

    @staticmethod
    def backward(ctx: Any, pressure: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        with torch.no_grad():
            grads = ctx.call.gradients(pressure.detach())
        if torch.is_grad_enabled():  # somebody means to differentiate what is returned
            given = pressure, *ctx.call.tensors.values()
            grads = [None if g is None else _Once.apply(g, *given) for g in grads]
        return None, *grads


class _Once(torch.autograd.Function):
    """A gradient that has no derivative, and says so to whoever asks for one.

    `once_differentiable` does not: `torch.autograd.grad` passes by its error where it was asked for
    the gradients of other tensors, and leaves out what should have come through here.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *given: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # pyright: ignore
        raise RuntimeError(
            "an EquilibriumLayer has one derivative, and this would differentiate twice"
        )
