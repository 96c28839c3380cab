"""Keeps and restores the state of modules besides buffers: counters, hidden states, generators."""

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from equigrad.errors import ProblemError

LARGE = 2**16
"""The most entries of a tensor that is copied; of larger tensors, only writes are detected."""

DEPTH = 3
"""The depth to which containers and objects in a module are searched."""

LONG = 1000
"""Containers with more entries are assumed to be data, which no evaluation changes."""

_OWN = frozenset(vars(nn.Module()))
"""Attributes of every module: parameters, buffers, modules, hooks and the training flag."""


class KeptAttributes:
    """Keeps the attributes and frozen parameters of modules, as `KeptBuffers` keeps buffers.

    Restoring undoes what an evaluation assigns to an attribute, or writes into a tensor, container
    or random generator that an attribute holds. It does not undo changes of large tensors, of long
    containers or deep inside objects. Torch's own modules are skipped: their attributes do not
    change.

    Args:
        modules: modules that a loss may call.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._holders = [
            (path, part)
            for module in modules
            for path, part in module.named_modules()
            if not type(part).__module__.startswith(("torch.", "equigrad."))
        ]
        self._frozen = [
            (f"{path}.{name}".lstrip("."), p)
            for path, part in self._holders
            for name, p in part.named_parameters(recurse=False)
            if not p.requires_grad
        ]

    def snapshot(self) -> "Attributes":
        """The current attributes and frozen parameters."""
        return Attributes(self._holders, self._frozen)


class Attributes:
    """The attributes and frozen parameters of modules at one moment.

    Args:
        holders: modules, by their path.
        frozen: parameters that do not require a gradient, by name.
    """

    def __init__(
        self, holders: list[tuple[str, nn.Module]], frozen: list[tuple[str, nn.Parameter]]
    ) -> None:
        seen: set[int] = set()
        self._values = [
            (path, part, {n: _Kept(v, seen) for n, v in vars(part).items() if n not in _OWN})
            for path, part in holders
        ]
        self._frozen = [(name, p, _Kept(p, seen)) for name, p in frozen]

    def changed(self) -> Iterator[str]:
        """Descriptions of all that has changed."""
        for path, part, values in self._values:
            now, where = (
                vars(part),
                f"{type(part).__name__} {path!r}" if path else type(part).__name__,
            )
            for name in [n for n in now if n not in _OWN and n not in values]:
                yield f"attribute {name!r} of {where}"
            for name, kept in values.items():
                if name not in now or now[name] is not kept.value or kept.changed():
                    yield f"attribute {name!r} of {where}"
        yield from (
            f"frozen parameter {name!r}" for name, _, kept in self._frozen if kept.changed()
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Restore all attributes and frozen parameters.

        Raises:
            ProblemError: a large frozen parameter, which was not copied, has been changed.
        """
        for _, part, values in self._values:
            now = vars(part)
            for name in [n for n in now if n not in _OWN and n not in values]:
                del now[name]
            for name, kept in values.items():
                kept.restore()
                now[name] = kept.value
        for name, _, kept in self._frozen:
            if kept.changed() and not kept.restore():
                raise ProblemError(
                    f"a loss writes into the frozen parameter {name!r}, which is too large to be "
                    f"copied and restored for every phase. Make it a buffer"
                )


class _Kept:
    """A value with a copy of its content.

    Args:
        value: any value.
        seen: ids of values that are kept elsewhere already.
        depth: depth to which to search it.
    """

    def __init__(self, value: Any, seen: set[int], depth: int = DEPTH) -> None:
        self.value = value
        self._version = value._version if _versioned(value) else 0
        self._inside: list[_Kept] = []
        self._copy: Any = None
        if id(value) in seen:
            return
        if isinstance(value, Tensor):
            seen.add(id(value))
            self._copy = value.detach().clone() if value.numel() <= LARGE else None
        elif (state := _state(value)) is not None:
            seen.add(id(value))
            self._copy = state
        elif depth and isinstance(value, list | set | deque | dict) and len(value) <= LONG:
            seen.add(id(value))
            self._copy = dict(value) if isinstance(value, dict) else list(value)
            items = self._copy.values() if isinstance(self._copy, dict) else self._copy
            self._inside = [_Kept(item, seen, depth - 1) for item in items if _may_change(item)]
        elif depth and isinstance(value, tuple) and len(value) <= LONG:
            self._inside = [_Kept(item, seen, depth - 1) for item in value if _may_change(item)]
        elif depth and _is_object(value):
            seen.add(id(value))
            self._copy = dict(vars(value))
            items = [item for item in self._copy.values() if _may_change(item)]
            self._inside = [_Kept(item, seen, depth - 1) for item in items]

    def changed(self) -> bool:
        """Whether the content has changed."""
        value, copy = self.value, self._copy
        if isinstance(value, Tensor):
            written = _versioned(value) and value._version != self._version
            return written or (copy is not None and not torch.equal(value.detach(), copy))
        if copy is None:
            return any(kept.changed() for kept in self._inside)
        if (state := _state(value)) is not None:
            return not _same_state(state, copy)
        now = vars(value) if isinstance(copy, dict) and not isinstance(value, dict) else value
        return not _same_items(now, copy) or any(kept.changed() for kept in self._inside)

    def restore(self) -> bool:
        """Restore the content; return whether that was possible."""
        for kept in self._inside:
            kept.restore()
        value, copy = self.value, self._copy
        if copy is None:
            return not isinstance(value, Tensor)
        if not self.changed():
            return True
        if isinstance(value, Tensor):
            value.detach().copy_(copy)
        elif (put := _put(value)) is not None:
            put(copy)
        elif isinstance(value, list):
            value[:] = copy
        else:
            inside: Any = value if isinstance(value, set | deque | dict) else vars(value)
            inside.clear()
            (inside.extend if isinstance(inside, deque) else inside.update)(copy)
        return True


def _versioned(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_inference()


def _may_change(value: Any) -> bool:
    """Whether the value is mutable."""
    return not isinstance(value, int | float | complex | str | bytes | type | None | Callable)


def _is_object(value: Any) -> bool:
    """Whether this is an object of a user's class, and not a module, class or callable."""
    plain = isinstance(value, type | nn.Module | Callable)
    return not plain and hasattr(value, "__dict__") and _made_by_user(type(value))


def _made_by_user(kind: type) -> bool:
    library = kind.__module__.split(".")[0]
    return library not in ("torch", "equigrad") and library not in sys.stdlib_module_names


def is_generator(value: object) -> bool:
    """Whether this is a random number generator."""
    numpy: Any = sys.modules.get("numpy")
    theirs = () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)
    return isinstance(value, (torch.Generator, random.Random, *theirs))


def _state(value: Any) -> Any:
    """The state of a random generator, or a copy of a small array; None for anything else."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.Generator):
        return value.bit_generator.state
    if isinstance(value, numpy.random.RandomState):
        return value.get_state(legacy=False)
    small = isinstance(value, numpy.ndarray) and value.size <= LARGE and value.flags.writeable
    return value.copy() if small else None


def _put(value: Any) -> Callable[[Any], Any] | None:
    """The function that writes a state back."""
    if isinstance(value, torch.Generator):
        return value.set_state
    if isinstance(value, random.Random):
        return value.setstate
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.Generator):
        return lambda state: setattr(value.bit_generator, "state", state)
    if isinstance(value, numpy.random.RandomState):
        return value.set_state
    return (lambda state: value.__setitem__(..., state)) if hasattr(value, "dtype") else None


def _same_state(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(_same_state(one[key], other[key]) for key in one)
    return one.tobytes() == other.tobytes() if hasattr(one, "tobytes") else one == other


def _same_items(one: Any, other: Any) -> bool:
    """Whether two containers hold the same objects in the same places."""
    if len(one) != len(other):
        return False
    if isinstance(other, dict):
        return all(key in one and one[key] is value for key, value in other.items())
    if isinstance(one, set):
        return all(item in one for item in other)
    return all(a is b for a, b in zip(one, other, strict=True))
