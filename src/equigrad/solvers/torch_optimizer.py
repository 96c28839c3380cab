"""Any optimiser of torch, unchanged."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, NoReturn

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.fields import Rule
from equigrad.solvers.solver import Objective, Solver
from equigrad.wording import meant


@dataclass(frozen=True, kw_only=True)
class TorchOptimizer(Solver):
    """Settles with a class of `torch.optim`, or any class with the same interface.

    The optimiser is never differentiated, so square roots, line searches and fused kernels are all
    fine. Weight decay inside the optimiser is not part of the inner loss that the estimators see:
    put it into the loss. Implicit estimators refuse it where it adds to the gradient, as in SGD and
    Adam, and say so where it acts beside it, as in AdamW.

    Attributes:
        optimizer: the class, called as `optimizer(params, **options)`.
        options: its keyword arguments.

    Raises:
        ConfigurationError: `optimizer` is not a class, or refuses the options.

    Example:
        >>> solver = TorchOptimizer(optimizer=torch.optim.Adam, options={"lr": 1e-3})
        >>> solver.max_steps
        1000
    """

    optimizer: Annotated[
        type[torch.optim.Optimizer],
        Rule("such as torch.optim.Adam", remedy="its arguments go into options={…}"),
    ]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            inspect.signature(self.optimizer).bind([], **self.options)
        except TypeError as error:
            self._refused(error)

    @classmethod
    def _instead(cls, name: str, given: Mapping[str, Any]) -> str:
        """The optimiser's own arguments go into `options`."""
        optimizer = given.get("optimizer", torch.optim.Optimizer)
        if meant(name, [f.name for f in fields(cls)]) and name not in _takes(optimizer):
            return ""
        return f" What the optimizer takes goes into options={{{name!r}: {given[name]!r}}}."

    @property
    def adaptive(self) -> bool:
        """Whether steps are scaled by the gradients that were seen: by all but SGD."""
        return self.optimizer is not torch.optim.SGD

    def decay(self) -> tuple[float, bool]:
        """The weight decay inside the optimiser, and whether it acts beside the gradient."""
        defaults = self.init([torch.zeros(1, requires_grad=True)]).defaults
        beside = defaults.get("decoupled_weight_decay", False) or self.optimizer in _BESIDE
        return float(defaults.get("weight_decay", 0.0) or 0.0), bool(beside)

    def continues(self, other: Solver) -> bool:
        """Only from the same class of optimiser."""
        return isinstance(other, TorchOptimizer) and other.optimizer is self.optimizer

    def _refused(self, error: Exception) -> NoReturn:
        name, options = self.optimizer.__name__, dict(self.options)
        raise ConfigurationError(f"{name} refuses options {options}: {error}") from error

    def init(self, params: list[Tensor], previous: Any = None) -> torch.optim.Optimizer:
        """A new optimiser over `params`, with the state of an earlier phase where given."""
        try:
            optimizer = self.optimizer(params, **self.options)
        except (TypeError, ValueError) as error:
            self._refused(error)
        if previous is not None:
            state = copy.deepcopy(previous.state_dict())
            state["param_groups"] = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(state)
        return optimizer

    def update(
        self,
        params: list[Tensor],
        velocity: tuple[Tensor, ...],
        state: torch.optim.Optimizer,
        objective: Objective,
    ) -> None:
        """One step; an optimiser that needs a closure evaluates as often as it likes."""

        def closure() -> Tensor:
            loss, velocity = objective()
            _set_gradients(params, velocity)
            return loss

        needed = inspect.signature(self.optimizer.step).parameters.get("closure")
        if needed is not None and needed.default is inspect.Parameter.empty:
            state.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
        else:
            _set_gradients(params, velocity)
            state.step()


_BESIDE = tuple(
    getattr(torch.optim, name)
    for name in ("AdamW", "Muon", "Adafactor")
    if hasattr(torch.optim, name)
)
"""Optimisers that shrink the weights themselves; of others, `decoupled_weight_decay` tells."""


def _takes(optimizer: Any) -> Mapping[str, Any]:
    """The arguments of a class of optimiser, if it is one."""
    return inspect.signature(optimizer).parameters if callable(optimizer) else {}


def _set_gradients(params: list[Tensor], velocity: tuple[Tensor, ...]) -> None:
    for p, v in zip(params, velocity, strict=True):
        p.grad = v.neg()
