"""The outer loop: estimate the meta-gradient, take a step of the outer optimiser, and repeat."""

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.estimators import Estimator
from equigrad.evaluation import check_tensors
from equigrad.fields import CountFrom0, Infinite, NotNegative, Positive, expect
from equigrad.gradient import MetaGradient, meta_gradient
from equigrad.problems import Params, Problem
from equigrad.solvers import Solver
from equigrad.wording import shown

Row = dict[str, float | int | str]
"""The log of one outer step."""


class Carried(Protocol):
    """Further state that goes from one outer step to the next, and into checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain values only."""
        ...

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from the return value of `state_dict`."""
        ...


@dataclass
class OuterState:
    """The full state of the outer loop, from which it can be continued.

    Attributes:
        meta_params: θ, updated in place.
        optimizer: the optimiser of `meta_params`.
        params: start of the next free phase.
        step: number of outer steps done.
        steps: number of outer steps to do; infinite if only time ends the loop.
        limit: seconds after which the loop ends.
        gradient_evaluations: total over all steps so far.
        seconds: time spent so far, including before resumes.
        history: one row for each outer step.
        copies: further values of θ or φ to keep, by name (an average, for example).
        ends: whether the current step is the last.
        carried: further state that goes from step to step.
        stopped: whether a callback has ended the loop.
    """

    meta_params: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    params: dict[str, Tensor]
    steps: float
    limit: float = math.inf
    step: int = 0
    gradient_evaluations: int = 0
    seconds: float = 0.0
    history: list[Row] = field(default_factory=list)
    copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    ends: bool = False
    carried: Carried | None = None
    stopped: bool = False

    @property
    def share(self) -> float:
        """The share of the loop that is done, by steps or by time; 1 at its end."""
        if self.ends or self.step >= self.steps or self.seconds >= self.limit:
            return 1.0
        return max(self.step / self.steps, self.seconds / self.limit)

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values only, so that it loads with `weights_only=True`."""
        return {
            "meta_params": {name: m.detach() for name, m in self.meta_params.items()},
            "optimizer": self.optimizer.state_dict(),
            "optimizer_class": type(self.optimizer).__name__,
            "params": self.params,
            "step": self.step,
            "gradient_evaluations": self.gradient_evaluations,
            "seconds": self.seconds,
            "history": self.history,
            "copies": self.copies,
            **({} if self.carried is None else {"carried": self.carried.state_dict()}),
            "stopped": self.stopped,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the return value of `state_dict`.

        Raises:
            Exception: the state is of another loop, or does not come from `state_dict`.
        """
        expect(CountFrom0, step=state["step"], gradient_evaluations=state["gradient_evaluations"])
        expect(NotNegative, seconds=state["seconds"])
        expect(tuple[dict, ...], history=state["history"])
        for what, mine in (("meta_params", self.meta_params), ("params", self.params)):
            there = {name: tuple(t.shape) for name, t in state[what].items()}
            here = {name: tuple(t.shape) for name, t in mine.items()}
            if there != here:
                raise ValueError(f"{what} there have the shapes {there}, here {here}")
        if state["optimizer_class"] != type(self.optimizer).__name__:
            raise ValueError(
                f"the optimizer there is {state['optimizer_class']}, here "
                f"{type(self.optimizer).__name__}"
            )
        with torch.no_grad():
            for name, m in self.meta_params.items():
                m.copy_(state["meta_params"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.params = {name: p.to(self.params[name]) for name, p in state["params"].items()}
        self.step = state["step"]
        self.gradient_evaluations = state["gradient_evaluations"]
        self.seconds = state["seconds"]
        self.history = list(state["history"])
        self.stopped = state.get("stopped", False)
        like = {**self.params, **self.meta_params}
        self.copies = {
            what: {name: m.to(like[name]) for name, m in copy.items()}
            for what, copy in state["copies"].items()
        }
        if self.carried is not None:
            self.carried.load_state_dict(state["carried"])
        torch.set_rng_state(state["rng"].cpu())
        if torch.cuda.is_available() and len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda_rng"]])


class Callback:
    """Watches an outer loop. Every method is optional.

    Attributes:
        acts: class attribute; whether it changes the state (a step size, for example) during the
            loop. With several processes, callbacks that do not act run only in the first.
    """

    acts: ClassVar[bool] = False

    def on_start(self, state: OuterState) -> None:
        """Called before the first step of this run; the place to load a checkpoint."""

    def on_step(self, state: OuterState, result: MetaGradient) -> None:
        """Called after an outer step; its row is `state.history[-1]`. May set `state.stopped`."""

    def on_end(self, state: OuterState, error: BaseException | None) -> None:
        """Called after the last step, or when an error or Ctrl-C ends the loop."""


def learn(
    problem: Problem,
    params: Params,
    meta_params: dict[str, Tensor],
    *,
    solver: Solver,
    estimator: Estimator | None = None,
    optimizer: torch.optim.Optimizer,
    steps: int,
    start: Literal["cold", "warm"] = "cold",
    project: Callable[[dict[str, Tensor]], None] | None = None,
    evaluate: Callable[[Params], Mapping[str, float]] | None = None,
    callbacks: Sequence[Callback] = (),
) -> OuterState:
    """Learn θ by repeated steps of an outer optimiser along the estimated meta-gradient.

    Args:
        problem: the problem.
        params: φ at the start of the first free phase. If θ itself is the start, as for `MAML`,
            the same dictionary as `meta_params`.
        meta_params: θ, leaves that require a gradient; updated in place.
        solver: settles the phases.
        estimator: estimates the meta-gradients; `Contrastive()` by default.
        optimizer: any `torch.optim` optimiser over the values of `meta_params`.
        steps: total number of outer steps, including those before a resume.
        start: `cold` starts every free phase at `params`, `warm` at the end of the last one.
        project: keeps θ feasible, in place, after every step; for example
            `ComplexSynapse.project_`.
        evaluate: computes metrics of the settled φ, which are logged in every step.
        callbacks: watch the loop, in this order.

    Returns:
        The state after the last step.

    Raises:
        ConfigurationError: steps < 0, an unknown start, an optimiser over other tensors, or params
            with a graph.

    Example:
        >>> import torch, equigrad as eg
        >>> problem = eg.Bilevel(
        ...     inner_loss=lambda p, m: 0.5 * (p["w"] - m["target"]).square().sum(),
        ...     outer_loss=lambda p, m: 0.5 * (p["w"] - 3.0).square().sum(),
        ... )
        >>> meta = {"target": torch.zeros(1, requires_grad=True)}
        >>> state = learn(
        ...     problem,
        ...     {"w": torch.zeros(1)},
        ...     meta,
        ...     solver=eg.GradientDescent(lr=0.5, max_steps=30),
        ...     optimizer=torch.optim.SGD(meta.values(), lr=0.5),
        ...     steps=20,
        ... )
        >>> round(meta["target"].item(), 3)
        3.0
    """
    expect(Literal["cold", "warm"], start=start)
    expect(CountFrom0, steps=steps)
    expect(Callable | None, evaluate=evaluate)
    check_tensors("params", params)
    check_tensors("meta_params", meta_params)
    computed = [name for name, p in params.items() if p.grad_fn is not None]
    if computed:
        raise ConfigurationError(
            f"params[{computed[0]!r}] was computed from other tensors and would not change when "
            f"those are learned. Detach it, pass the tensors of meta_params themselves, or call "
            f"meta_gradient in a loop of your own"
        )

    def gradient(state: OuterState) -> MetaGradient:
        result = meta_gradient(
            problem, state.params, meta_params, solver=solver, estimator=estimator
        )
        if start == "warm":
            state.params = result.params
        return result

    return descend(
        gradient,
        meta_params,
        params=params,
        optimizer=optimizer,
        steps=steps,
        project=project,
        evaluate=None if evaluate is None else lambda _, result: evaluate(result.params),
        callbacks=callbacks,
    )


def descend(
    gradient: Callable[[OuterState], MetaGradient],
    meta_params: dict[str, Tensor],
    *,
    params: Params | None = None,
    optimizer: torch.optim.Optimizer,
    steps: float,
    limit: float = math.inf,
    project: Callable[[dict[str, Tensor]], None] | None = None,
    evaluate: Callable[[OuterState, MetaGradient], Mapping[str, float]] | None = None,
    callbacks: Sequence[Callback] = (),
    carried: Carried | None = None,
) -> OuterState:
    """Run the outer loop with any gradient of θ.

    Args:
        gradient: estimates the meta-gradient of the state's θ, at the state's step.
        meta_params: as for `learn`.
        params: φ to keep in the state, if free phases start from it.
        optimizer: as for `learn`.
        steps: as for `learn`; `math.inf` if only time ends the loop.
        limit: seconds after which the loop ends, including those before a resume and those of
            `evaluate`.
        project: as for `learn`.
        evaluate: computes metrics to log, after the optimiser's step, when the state knows whether
            this step is the last.
        callbacks: as for `learn`.
        carried: further state that the gradient keeps from step to step.

    Returns:
        The state after the last step.

    Raises:
        ConfigurationError: steps < 0, a limit ≤ 0, or an optimiser over other tensors or that needs
            a closure.
    """
    expect(CountFrom0 | Infinite, steps=steps)
    expect(Positive | Infinite, limit=limit)
    expect(torch.optim.Optimizer, optimizer=optimizer)
    expect(Callable | None, project=project, evaluate=evaluate)
    expect(tuple[Callback, ...], callbacks=callbacks)
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigurationError(
            f"{type(optimizer).__name__} evaluates a loss several times in one step, but an outer "
            f"step has a single gradient; use an optimizer that steps without a closure, such as "
            f"torch.optim.Adam"
        )
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, m in meta_params.items() if id(m) not in stepped]
    if missing:
        raise ConfigurationError(
            f"the optimizer does not update meta-parameter {missing[0]!r}; make it with "
            f"meta_params.values(), the same tensors that are passed as meta_params"
        )
    state = OuterState(meta_params, optimizer, dict(params or {}), steps, limit, carried=carried)
    error: BaseException | None = None
    try:
        for callback in callbacks:
            callback.on_start(state)
        state.ends = state.stopped or state.step >= steps or state.seconds >= limit
        while not state.ends:
            began = time.perf_counter()
            result = gradient(state)
            result.assign()
            optimizer.step()
            if project is not None:
                project(meta_params)
            state.gradient_evaluations += result.gradient_evaluations
            before = state.seconds
            state.seconds = before + time.perf_counter() - began
            state.ends = state.step + 1 >= steps or state.seconds >= limit
            metrics = {} if evaluate is None else _metrics(evaluate(state, result))
            state.seconds = before + time.perf_counter() - began
            state.history.append(_row(state, result, metrics))
            state.step += 1
            for callback in callbacks:
                callback.on_step(state, result)
            state.ends = state.ends or state.stopped
    except BaseException as caught:
        error = caught
        raise
    finally:
        with ExitStack() as ends:  # end every callback, even if another fails
            for callback in callbacks:
                ends.callback(callback.on_end, state, error)
    return state


def _metrics(found: object) -> dict[str, float]:
    """The metrics of a user's function, checked to be values that a row can hold."""
    if isinstance(found, Mapping):
        row = {n: v.item() if getattr(v, "ndim", 1) == 0 else v for n, v in found.items()}
        if all(isinstance(name, str) and isinstance(v, Real) for name, v in row.items()):
            return row
    raise ConfigurationError(
        f"evaluate and validate must return a dictionary of metrics, such as {{'accuracy': 0.9}}, "
        f"got {shown(found)}"
    )


def _row(state: OuterState, result: MetaGradient, metrics: Mapping[str, float]) -> Row:
    free = result.phases[0]
    uneasy = free.failed or result.status != str(free)
    return {
        "outer_step": state.step,
        "outer_loss": result.outer_loss,
        **metrics,
        "residual": result.phases[0].residual,
        "gradient_norm": torch.stack([g.norm() for g in result.grads.values()]).norm().item(),
        **({} if result.error_estimate is None else {"error_estimate": result.error_estimate}),
        "gradient_evaluations": state.gradient_evaluations,
        "seconds": round(state.seconds, 3),
        "status": result.status,
        **({"uneasy": True} if uneasy else {}),
    }
