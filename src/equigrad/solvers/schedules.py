"""Solver settings that are functions of the meta-parameters and of the step."""

import inspect
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.problems import Params
from equigrad.solvers.solver import Objective
from equigrad.wording import listed

Schedule = Callable[[Params, int], Any]
"""`(meta_params, step) -> setting`.

The setting is a number or a tensor without dimensions for all params, or a dictionary with one for
each param, by name. Such a tensor has no dimensions, or one number for each weight; it may leave
out leading dimensions (of tasks, for example)."""


def asked(name: str, schedule: Schedule, meta_params: Params, step: int) -> Any:
    """The value of a schedule; raises an explanatory error if it uses a name that θ lacks."""
    try:
        said = schedule(meta_params, step)
    except TypeError as error:
        _refuse_arity(name, schedule, error)
        raise
    except KeyError as error:
        raise ConfigurationError(
            f"{name} uses a meta-parameter {error}, which does not exist: meta_params has "
            f"{listed(meta_params)}"
        ) from error
    given = said.values() if isinstance(said, Mapping) else [said]
    for value in (v for item in given for v in (item if isinstance(item, tuple) else (item,))):
        if not isinstance(value, Tensor | Real) or value is True or value is False:
            raise ConfigurationError(
                f"{name} is a function of (meta_params, step), and it returned {said!r}. It must "
                f"return a number, a tensor, or a dictionary with a number or tensor for each of "
                f"params"
            )
    return said


def _refuse_arity(name: str, schedule: Schedule, error: TypeError) -> None:
    """Raise a `ConfigurationError` if a schedule does not take its two arguments."""
    try:
        signature = inspect.signature(schedule)
    except (TypeError, ValueError):  # a built-in function may have no signature
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise ConfigurationError(
            f"{name} is called as {name}(meta_params, step), but its signature is {signature}: "
            f"change it to accept these two arguments"
        ) from error


def settings(name: str, setting: Any, objective: Objective) -> list[Any]:
    """A setting for each of the params, in their order.

    Args:
        name: name of the setting.
        setting: a constant, or a `Schedule`.
        objective: provides θ and the step.

    Raises:
        ConfigurationError: the schedule returns an invalid value.
    """
    if callable(setting):
        setting = asked(name, setting, objective.meta_params, objective.step())
    if not isinstance(setting, Mapping):
        if isinstance(setting, Tensor) and setting.ndim:
            raise ConfigurationError(
                f"{name} is a tensor of shape {tuple(setting.shape)}, but a single value for all "
                f"params must be a scalar. Return a scalar, or a dictionary with a value for each "
                f"of params"
            )
        return [setting] * len(objective.params)
    missing = [n for n in objective.params if n not in setting]
    if missing:
        raise ConfigurationError(f"{name} lacks a value for params {listed(missing)}")
    for n, p in objective.params.items():
        value = setting[n]
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        if shape and shape != tuple(p.shape[p.ndim - len(shape) :]):
            raise ConfigurationError(
                f"{name} for {n!r} has shape {shape}. It must be a scalar, or have the shape of "
                f"the parameter, {tuple(p.shape)}, or that of its last dimensions"
            )
    return [setting[n] for n in objective.params]
