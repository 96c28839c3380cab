"""Finds the modules that a loss calls, and keeps and restores their buffers."""

import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from equigrad.attributes import Attributes, KeptAttributes, is_generator


def find_modules(*roots: object) -> tuple[nn.Module, ...]:
    """All modules that the given functions can reach by name.

    The search covers closures, globals and attributes that a function's code names, defaults,
    `functools.partial`, bound methods and the attributes of objects. It does not cover class
    bodies, attributes of imported Python modules, long lists, or names computed at run time. Pass
    such modules to `Bilevel(modules=…)`.

    Args:
        roots: functions, modules, or objects that hold them.

    Returns:
        The modules found, each once; a module inside another is left to the outer one.
    """
    found = {id(thing): thing for thing in _reachable(roots) if isinstance(thing, nn.Module)}
    inside = {id(m) for module in found.values() for m in module.modules() if m is not module}
    return tuple(module for key, module in found.items() if key not in inside)


def find_generators(*roots: object) -> list[str]:
    """The kinds of random generators that the given functions can reach by name."""
    kinds = {
        f"{type(thing).__module__.split('.')[0].lstrip('_')}.{type(thing).__name__}"
        for thing in _reachable(roots)
        if is_generator(thing)
    }
    return sorted(kinds)


def _reachable(roots: Iterable[object]) -> Iterator[object]:
    """Every value that functions can reach by name; modules are not searched."""
    seen: set[int] = set()
    queue: list[object] = list(roots)
    while queue:
        thing = queue.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        yield thing
        if isinstance(thing, nn.Module) or is_generator(thing):
            continue
        if isinstance(thing, types.FunctionType):
            queue.extend(_named_in(thing))
        elif isinstance(thing, types.MethodType):
            queue.extend((thing.__func__, thing.__self__))
        elif isinstance(thing, functools.partial):
            queue.extend((thing.func, *thing.args, *thing.keywords.values()))
        elif isinstance(thing, list | tuple) and len(thing) < 100:
            queue.extend(thing)
        elif isinstance(thing, Mapping) and len(thing) < 100:
            queue.extend(thing.values())
        elif _holds_attributes(thing):
            queue.extend((*vars(thing).values(), getattr(type(thing), "__call__", None)))  # noqa: B004


def _named_in(function: types.FunctionType) -> Iterable[object]:
    """The values in a function's closure, defaults and named globals."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable without a value yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
        for name in code.co_names:
            value = function.__globals__.get(name)
            # torch's own functions do not reach modules of the user
            own = isinstance(value, nn.Module) or is_generator(value)
            if own or not _is_torch(value) or _holds_attributes(value):
                yield value


def _holds_attributes(thing: object) -> bool:
    """Whether this is an object of a user's class, whose attributes are searched."""
    plain = isinstance(thing, type | types.ModuleType)
    users = not _is_torch(type(thing)) or isinstance(thing, Dataset)  # torch's hold user modules
    return hasattr(thing, "__dict__") and not plain and users


def _is_torch(value: object) -> bool:
    return str(getattr(value, "__module__", "")).split(".")[0] == "torch"


class Snapshot(tuple[Tensor, ...]):
    """The values of buffers at one moment, with the other state of their modules."""

    attributes: Attributes | None = None


class KeptBuffers:
    """Takes and restores snapshots of the buffers of modules.

    Other state of the modules, in attributes or frozen parameters, is included.

    On exit from the context, also by an exception, the state on entry is restored.

    Args:
        modules: modules whose buffers (statistics of batch normalisation, for example) a loss may
            change when it is evaluated.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = tuple(modules)
        self._attributes = KeptAttributes(modules)
        holders = {i: m for i, m in enumerate(modules) if next(m.buffers(), None) is not None}
        alone = len(holders) == 1
        self._places = [
            (part, name, buffer)
            for module in holders.values()
            for part in module.modules()
            for name, buffer in part.named_buffers(recurse=False)
        ]
        self._names = [
            ".".join(filter(None, ("" if alone else str(i), path, name)))
            for i, module in holders.items()
            for path, part in module.named_modules()
            for name, _ in part.named_buffers(recurse=False)
        ]
        self.before = Snapshot()

    def __enter__(self) -> Self:
        self.before = self.snapshot()
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore(self.before)

    def snapshot(self) -> Snapshot:
        """A copy of every buffer's current value."""
        taken = Snapshot(part.get_buffer(name).detach().clone() for part, name, _ in self._places)
        taken.attributes = self._attributes.snapshot()
        return taken

    def changed(self) -> list[str]:
        """Descriptions of the module state, besides buffers, that has changed since entry."""
        return [] if self.before.attributes is None else [*self.before.attributes.changed()]

    def named(self, snapshot: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """A snapshot's values, by the names of the module's `named_buffers()`.

        If several modules have buffers, each name begins with its module's index.
        """
        return dict(zip(self._names, snapshot, strict=True))

    @torch.no_grad()
    def restore(self, snapshot: tuple[Tensor, ...]) -> None:
        """Write a snapshot's values into the buffers, and restore the other state."""
        if isinstance(snapshot, Snapshot) and snapshot.attributes is not None:
            snapshot.attributes.restore()
        for (part, name, buffer), value in zip(self._places, snapshot, strict=True):
            setattr(part, name, buffer.copy_(value))

    def use_copies(self) -> None:
        """Let modules write into copies until the next `restore`: a graph keeps the buffers."""
        for part, name, _ in self._places:
            setattr(part, name, part.get_buffer(name).detach().clone())
