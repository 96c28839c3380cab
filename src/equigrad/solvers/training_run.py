"""The state of a torch optimiser during a phase, with its schedule and accumulated gradients."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from equigrad.errors import ConfigurationError

Scheduler = Callable[[torch.optim.Optimizer], LRScheduler]
"""Makes a learning-rate schedule for an optimiser: `functools.partial(StepLR, step_size=10)`."""


class TrainingRun:
    """An optimiser, its schedule, and the gradients accumulated so far.

    Args:
        optimizer: the optimiser of the parameters that settle.
        scheduler: makes its schedule; None for a constant rate.

    Attributes:
        optimizer: the argument.

    Raises:
        ConfigurationError: the scheduler does not return a schedule that depends on steps alone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Scheduler | None) -> None:
        self.optimizer = optimizer
        self._scheduler = scheduler
        self._schedule = None if scheduler is None else _made(scheduler, optimizer)
        self._peak = self._rate()
        self._waiting: list[Tensor] = []
        self._gathered = 0

    def go_on(self, previous: "TrainingRun") -> None:
        """Copy the state of another run, and its position in the schedule if that is the same."""
        state = copy.deepcopy(previous.optimizer.state_dict())
        state["param_groups"] = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(state)
        self._waiting = [w.clone() for w in previous._waiting]
        self._gathered = previous._gathered
        self.take_place(previous)

    def take_place(self, previous: "TrainingRun") -> None:
        """Copy the position of another run in the schedule; does nothing if schedules differ."""
        if self._schedule is None or previous._schedule is None:
            return
        if previous._scheduler is not self._scheduler:
            return
        groups = zip(self.optimizer.param_groups, previous.optimizer.param_groups, strict=True)
        for group, other in groups:
            group.update({name: value for name, value in other.items() if name != "params"})
        self._schedule.load_state_dict(copy.deepcopy(previous._schedule.state_dict()))
        self._peak = previous._peak

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values, to continue from in another process."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
            "peak": self._peak,
            "waiting": self._waiting,
            "gathered": self._gathered,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the return value of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self._schedule is not None:
            self._schedule.load_state_dict(state["schedule"])
        self._peak, self._gathered = state["peak"], state["gathered"]
        self._waiting = list(state["waiting"])

    def gather(self, velocity: tuple[Tensor, ...], batches: int) -> tuple[Tensor, ...] | None:
        """The mean velocity once there are enough batches for a step; None before."""
        if batches == 1:
            return velocity
        if self._gathered:
            torch._foreach_add_(self._waiting, velocity)
        else:
            self._waiting = [v.clone() for v in velocity]
        self._gathered += 1
        if self._gathered < batches:
            return None
        mean = tuple(torch._foreach_div(self._waiting, self._gathered))
        self._waiting, self._gathered = [], 0
        return mean

    def advance(self) -> None:
        """Go to the next rate of the schedule."""
        if self._schedule is not None:
            try:
                self._schedule.step()
            except ValueError as error:  # OneCycleLR has a last step
                raise ConfigurationError(
                    f"the scheduler has no more steps: {error}. Nudged phases continue the "
                    f"scheduler of the free phase; give them a nudged_solver with its own "
                    f"scheduler"
                ) from error
            self._peak = max(self._peak, self._rate())

    def share_ahead(self, steps: int) -> float:
        """Take a number of steps; return their mean rate, relative to the largest rate so far."""
        total = 0.0
        for step in range(steps):
            if step:
                self.optimizer.step()
                self.advance()
            total += self._rate()
        return total / steps / self._peak if self._peak else 0.0

    def _rate(self) -> float:
        return max((float(g.get("lr", math.nan)) for g in self.optimizer.param_groups), default=0.0)


def _made(scheduler: Scheduler, optimizer: torch.optim.Optimizer) -> LRScheduler:
    found: Any = scheduler(optimizer)
    if isinstance(found, ReduceLROnPlateau):
        raise ConfigurationError(
            "scheduler returns a ReduceLROnPlateau, which needs a metric after every step, and "
            "there is none. Use a scheduler that depends on the step alone, such as "
            "CosineAnnealingLR"
        )
    if not isinstance(found, LRScheduler):
        raise ConfigurationError(
            f"scheduler must be a function that takes the optimizer and returns a "
            f"torch.optim.lr_scheduler.LRScheduler, but it returned {type(found).__name__}. An "
            f"example is scheduler=lambda optimizer: StepLR(optimizer, step_size=10)"
        )
    return found
