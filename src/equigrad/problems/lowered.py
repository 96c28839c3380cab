"""Autocast: the user's functions compute in a lower precision, everything else in full."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equigrad.problems.problem import Problem
from equigrad.problems.pullback import Params


def lowered(problem: Problem, tensors: Iterable[Tensor]) -> Problem:
    """A problem whose functions run under the autocast that is active now, without its cache.

    Autocast caches its casts of weights until it is left. Since settling weights change in place,
    cached casts would be out of date. Return values are promoted to the precision of the params, so
    that no further precision is lost.

    Args:
        problem: any problem.
        tensors: all tensors of the computation; they tell for which devices autocast matters.

    Returns:
        The same problem if autocast is not active.
    """
    if not _within_autocast():
        return problem
    casts = _casts(tensors)
    return problem.with_(
        **{problem.name(s): _wrapped(problem.function(s), casts) for s in ("inner", "outer")}
    )


def unlowered(problem: Problem) -> Problem:
    """The problem whose functions compute in the precision of their arguments."""
    functions = {problem.name(s): problem.function(s) for s in ("inner", "outer")}
    own = {name: f.function for name, f in functions.items() if isinstance(f, _Lowered)}
    return problem.with_(**own)


def lower_precision(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The lowest precision that autocast now gives to functions of these tensors; None without."""
    dtypes = [dtype for _, dtype in _casts(tensors)]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def full_precision(tensors: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """A context with autocast off, for everything but the user's functions."""
    stack = ExitStack()
    for kind, dtype in _casts(tensors):
        stack.enter_context(torch.autocast(kind, dtype, enabled=False))
    return stack


def _casts(tensors: Iterable[Tensor]) -> tuple[tuple[str, torch.dtype], ...]:
    """The device types for which autocast is on, and the dtype that each casts to."""
    return tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in sorted({t.device.type for t in tensors})
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    )


def _within_autocast() -> bool:
    """Whether autocast contexts are open, even disabled ones, so that a cache may persist."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth > 0


def _wrapped(function: Callable[..., Any], casts: tuple[tuple[str, torch.dtype], ...]) -> Any:
    from equigrad.problems.energy_based import Primitive
    from equigrad.problems.fixed_point import Relaxation

    cheaper = isinstance(function, Relaxation | Primitive)
    return (_LoweredAt if cheaper else _Lowered)(function, casts)


@dataclass(frozen=True)
class _Lowered:
    function: Callable[..., Any]
    casts: tuple[tuple[str, torch.dtype], ...]

    def __call__(self, params: Params, *others: Any) -> Any:
        # an autocast context inside the user's function may have left casts in the cache
        torch.clear_autocast_cache()
        with ExitStack() as stack:
            for kind, dtype in self.casts:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
            found = self.function(params, *others)
        return _raised(found, params)


@dataclass(frozen=True)
class _LoweredAt(_Lowered):
    """A function under autocast that has a cheaper form at fixed meta-parameters."""

    def at(self, meta_params: Params) -> Callable[[Params], Any]:
        """The cheaper form under the same autocast."""
        function: Any = self.function
        with ExitStack() as stack:
            for kind, dtype in self.casts:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
            return _Lowered(function.at(meta_params), self.casts)


def _raised(found: Any, params: Params) -> Any:
    """A function's result, promoted to at least the precision of its params."""
    if isinstance(found, Tensor):
        return _promoted(found, next(iter(params.values())))
    if isinstance(found, Mapping):
        return {
            n: _promoted(t, params[n]) if isinstance(t, Tensor) and n in params else t
            for n, t in found.items()
        }
    return found


def _promoted(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, like.dtype))
