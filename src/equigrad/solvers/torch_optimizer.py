"""A solver that uses any optimiser of torch, unchanged."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Annotated, Any, NoReturn

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.fields import Count, Positive, Rule, require
from equigrad.problems import Params
from equigrad.solvers.rule_steps import RuleSteps
from equigrad.solvers.solver import Objective, Solver
from equigrad.solvers.training_run import Scheduler, TrainingRun
from equigrad.solvers.update_rules import UPDATE_RULES
from equigrad.wording import listed, meant


@dataclass(frozen=True, kw_only=True)
class TorchOptimizer(Solver):
    """Settles with a class of `torch.optim`, or any class with the same interface.

    Torch's own optimiser takes the steps, so that it may use square roots, line searches or fused
    kernels. Estimators that differentiate the steps (`Unrolled`, `MAML`, `ForwardMode`) compute the
    same steps by the library's own arithmetic, for SGD, Adam, AdamW, RMSprop, Adagrad, Adamax,
    NAdam and RAdam.

    Weight decay inside the optimiser is not part of the inner loss that estimators see: put it into
    the loss. Implicit estimators refuse weight decay that is added to the gradient, as in SGD and
    Adam, and note decoupled weight decay, as in AdamW, in `status`.

    Phases that start at the free solution continue from its state: moments, the position in the
    schedule, and accumulated gradients. They therefore all have the same rates. If these are zero,
    the phases cannot move, and `Contrastive` refuses; if they are below a hundredth of the largest
    rate before, `status` says so.

    Attributes:
        optimizer: the class, called as `optimizer(params, **options)`.
        options: its keyword arguments. Numbers of the optimisers above may be functions
            `(meta_params, step)`, as for `GradientDescent`: `{"lr": lambda meta, step:
            meta["log_lr"].exp()}`; a function for `betas` returns a pair.
        scheduler: makes a learning-rate schedule; called with a new optimiser in every phase:
            `lambda optimizer: get_linear_schedule_with_warmup(optimizer, 10, 100)`. It steps after
            every step of the optimiser.
        clip_norm: the largest norm of the gradient of all parameters; larger ones are scaled down.
        clip_value: the largest entry of a gradient; larger ones are clipped, before `clip_norm`.
        accumulate: number of batches whose mean gradient makes a step of the optimiser. `max_steps`
            counts batches.

    Raises:
        ConfigurationError: `optimizer` is not a class, or refuses the options; an option is a
            function but may not be one, or is combined with a scheduler, clipping or accumulation;
            the scheduler does not return a schedule; or an optimiser that evaluates the loss itself
            is asked to accumulate.

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
    scheduler: Scheduler | None = None
    clip_norm: Positive | None = None
    clip_value: Positive | None = None
    accumulate: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            inspect.signature(self.optimizer).bind([], **self.options)
        except TypeError as error:
            self._refused(error)
        for name in self.schedules():
            served = self.optimizer in UPDATE_RULES and name in SETTINGS
            require(
                served,
                f"option {name!r} of {self.optimizer.__name__} cannot be a function of "
                f"(meta_params, step). This is possible only for {listed(SETTINGS)} of {_served()}",
            )
            require(
                not self._more,
                f"option {name!r} cannot be a function of (meta_params, step) together with "
                f"{listed(self._more)}. Put the schedule into that function and leave the others "
                f"out",
            )
        if self.scheduler is not None:
            self.init([torch.zeros(1, requires_grad=True)])
        require(
            self.accumulate == 1 or not self._evaluates,
            f"{self.optimizer.__name__} evaluates the loss several times in one step, so it "
            f"cannot accumulate gradients over batches; use accumulate=1",
        )

    @property
    def _more(self) -> list[str]:
        """The options that surround the optimiser's own steps."""
        more = ("scheduler", "clip_norm", "clip_value", "accumulate")
        return [name for name in more if getattr(self, name) != getattr(TorchOptimizer, name)]

    def schedules(self) -> dict[str, Callable[[Params, int], Any]]:
        """The options that are functions."""
        return {n: o for n, o in self.options.items() if callable(o)}

    def recorded(self) -> RuleSteps | None:
        """The same steps by the library's own arithmetic; None for other optimisers."""
        return None if self._more else self._steps

    @cached_property
    def _steps(self) -> RuleSteps | None:
        rule = UPDATE_RULES.get(self.optimizer)
        if rule is None:
            return None
        return RuleSteps(
            rule=rule,
            options={**self._defaults(), **self.options},
            max_steps=self.max_steps,
            tol=self.tol,
            check_every=self.check_every,
        )

    def _defaults(self) -> dict[str, Any]:
        """All settings of the optimiser, with numbers in the places of functions."""
        plain = {n: o for n, o in self.options.items() if not callable(o)}
        if "momentum" in self.schedules():
            plain["momentum"] = 0.5
        try:
            made = self.optimizer([torch.zeros(1, requires_grad=True)], **plain)
        except (TypeError, ValueError) as error:
            self._refused(error)
        return {"decoupled_weight_decay": False, **made.defaults}

    @classmethod
    def _instead(cls, name: str, given: Mapping[str, Any]) -> str:
        """The advice that arguments of the optimiser go into `options`."""
        optimizer = given.get("optimizer", torch.optim.Optimizer)
        if meant(name, [f.name for f in fields(cls)]) and name not in _takes(optimizer):
            return ""
        return f" Arguments of the optimizer go into options={{{name!r}: {given[name]!r}}}."

    @property
    def adaptive(self) -> bool:
        """Whether steps are scaled by past gradients, which is assumed of all but SGD."""
        return self.optimizer is not torch.optim.SGD

    def decay(self) -> tuple[float, bool]:
        """The weight decay inside the optimiser, and whether it is decoupled from the gradient."""
        defaults = self._defaults()
        if "weight_decay" in self.schedules():
            defaults["weight_decay"] = math.nan  # unknown, but not zero
        beside = defaults.get("decoupled_weight_decay", False) or self.optimizer in _BESIDE
        return float(defaults.get("weight_decay", 0.0) or 0.0), bool(beside)

    def continues(self, other: Solver) -> bool:
        """Whether the other solver has the same class of optimiser."""
        return isinstance(other, TorchOptimizer) and other.optimizer is self.optimizer

    def _refused(self, error: Exception) -> NoReturn:
        name, options = self.optimizer.__name__, dict(self.options)
        raise ConfigurationError(
            f"{name} cannot be made with options {options}: {error}"
        ) from error

    def init(self, params: list[Tensor], previous: Any = None) -> Any:
        """A new optimiser over `params`, with the state of an earlier phase if there is one."""
        if self.schedules() and (steps := self._steps) is not None:
            return steps.init(params, previous)
        try:
            optimizer = self.optimizer(params, **self.options)
        except (TypeError, ValueError) as error:
            self._refused(error)
        run = TrainingRun(optimizer, self.scheduler)
        if previous is not None:
            run.go_on(previous)
        return run

    def hindrance(self, state: TrainingRun | None) -> str | None:
        """How far a decayed schedule limits later phases, in words.

        Raises:
            ConfigurationError: later phases cannot move, or are too short for a step.
        """
        if self.max_steps is None or (self.scheduler is None and self.accumulate == 1):
            return None
        steps = self.max_steps // self.accumulate
        require(
            steps > 0,
            f"accumulate={self.accumulate} makes one step of {self.accumulate} batches, but a "
            f"nudged phase has max_steps={self.max_steps} batches, too few for a step. Raise "
            f"max_steps of the nudged solver",
        )
        trial = self.init([torch.zeros(1, requires_grad=True)])
        if state is not None:
            trial.take_place(state)
        share = trial.share_ahead(steps)
        if share >= FADED:
            return None
        after = (
            f"nudged phases continue the scheduler of the free phase, whose learning rate has "
            f"fallen to {share:.1%} of its largest value"
        )
        instead = (
            "Let the schedule end at a higher rate, restart it for nudged phases "
            "(momentum='reset'), or give them a constant rate "
            "(nudged_solver=dataclasses.replace(solver, scheduler=None, max_steps=…))"
        )
        require(share > 0, f"{after}, so that they cannot move. {instead}")
        return f"{after}, so that they hardly respond to the nudge. {instead}"

    def update(
        self,
        params: list[Tensor],
        velocity: tuple[Tensor, ...],
        state: Any,
        objective: Objective,
    ) -> None:
        """One step; an optimiser that needs a closure evaluates as often as it wants."""
        if self.schedules() and (steps := self._steps) is not None:
            steps.update(params, velocity, state, objective)
            return

        def closure() -> Tensor:
            loss, velocity = objective()
            self._set_gradients(params, velocity)
            return loss

        if self._evaluates:
            state.optimizer.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
        else:
            mean = state.gather(velocity, self.accumulate)
            if mean is None:
                return
            self._set_gradients(params, mean)
            state.optimizer.step()
        state.advance()

    @property
    def _evaluates(self) -> bool:
        """Whether the optimiser needs a closure."""
        needed = inspect.signature(self.optimizer.step).parameters.get("closure")
        return needed is not None and needed.default is inspect.Parameter.empty

    def _set_gradients(self, params: list[Tensor], velocity: tuple[Tensor, ...]) -> None:
        for p, v in zip(params, velocity, strict=True):
            p.grad = v.neg()
        if self.clip_value is not None:
            torch.nn.utils.clip_grad_value_(params, self.clip_value)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self.clip_norm)


FADED = 0.01
"""A schedule below this share of its largest rate hardly moves the parameters."""

SETTINGS = (
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "betas",
    "eps",
    "alpha",
    "lr_decay",
    "momentum_decay",
)
"""Options that may be functions."""


def _served() -> str:
    return ", ".join(optimizer.__name__ for optimizer in UPDATE_RULES)


_BESIDE = tuple(
    getattr(torch.optim, name)
    for name in ("AdamW", "Muon", "Adafactor")
    if hasattr(torch.optim, name)
)
"""Optimisers with decoupled weight decay; others have an option `decoupled_weight_decay`."""


def _takes(optimizer: Any) -> Mapping[str, Any]:
    """The parameters of an optimiser's signature, if it is callable."""
    return inspect.signature(optimizer).parameters if callable(optimizer) else {}
