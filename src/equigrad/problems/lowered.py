"""Problems under autocast: the user's functions compute in a lower precision, nothing else does."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from equigrad.problems.problem import Problem
from equigrad.problems.pullback import Params


def lowered(problem: Problem, tensors: Iterable[Tensor]) -> Problem:
    """A problem whose functions take the autocast of this moment with them, without its cache.

    Autocast keeps the casts of weights until it is left. Weights that settle move in place
    meanwhile, and a loss would go on with what they were. What the functions return comes back in
    the precision of what they were given, so that no more of it is lost.

    Args:
        problem: any.
        tensors: whatever is computed with; autocast for their devices is the one to take along.

    Returns:
        The problem itself, if there is no autocast around.
    """
    if not _within_autocast():
        return problem
    casts = _casts(tensors)
    given: Any = problem
    found = replace(
        given,
        **{problem.name(s): _wrapped(problem.function(s), casts) for s in ("inner", "outer")},
    )
    object.__setattr__(found, "ranks", problem.ranks)
    return found


def unlowered(problem: Problem) -> Problem:
    """The problem whose functions compute in the precision of what they are given."""
    given: Any = problem
    functions = {problem.name(s): problem.function(s) for s in ("inner", "outer")}
    own = {name: f.function for name, f in functions.items() if isinstance(f, _Lowered)}
    if not own:
        return problem
    found = replace(given, **own)
    object.__setattr__(found, "ranks", problem.ranks)
    return found


def lower_precision(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """That in which functions of these tensors compute under the autocast of this moment."""
    dtypes = [dtype for _, dtype in _casts(tensors)]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def full_precision(tensors: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Where all that is not a user's function computes as it is."""
    stack = ExitStack()
    for kind, dtype in _casts(tensors):
        stack.enter_context(torch.autocast(kind, dtype, enabled=False))
    return stack


def _casts(tensors: Iterable[Tensor]) -> tuple[tuple[str, torch.dtype], ...]:
    """The kinds of device that autocast is on for, and to what it casts there."""
    return tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in sorted({t.device.type for t in tensors})
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    )


def _within_autocast() -> bool:
    """Whether a cache may outlive an evaluation: also inside an autocast that is switched off."""
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
        # an autocast of the user's own, within this one, would fill the cache and leave it
        torch.clear_autocast_cache()
        with ExitStack() as stack:
            for kind, dtype in self.casts:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
            found = self.function(params, *others)
        return _raised(found, params)


@dataclass(frozen=True)
class _LoweredAt(_Lowered):
    """Of a function that has a cheaper form at fixed meta-parameters."""

    def at(self, meta_params: Params) -> Callable[[Params], Any]:
        """The cheaper form under the same autocast."""
        function: Any = self.function
        with ExitStack() as stack:
            for kind, dtype in self.casts:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
            return _Lowered(function.at(meta_params), self.casts)


def _raised(found: Any, params: Params) -> Any:
    """What a function returned, in no lower precision than its params have."""
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
