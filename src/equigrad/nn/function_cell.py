"""A function as a cell: a module that finds and registers the modules which the function uses."""

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from equigrad.errors import ConfigurationError, ProblemError


def as_cell(cell: Callable[..., Any]) -> nn.Module:
    """A module as it is; any other callable as a `FunctionCell`.

    Raises:
        ConfigurationError: it cannot be called as `cell(h, *inputs)`, or uses a variable that has
            no value yet.
    """
    if isinstance(cell, nn.Module):
        return cell
    if not callable(cell) or isinstance(cell, type):
        given = f"the class {cell.__name__}" if isinstance(cell, type) else type(cell).__name__
        raise ConfigurationError(
            f"cell must be a module or a function, called as cell(h, *inputs), got {given}"
        )
    return FunctionCell(cell)


class FunctionCell(nn.Module):
    """A function `f(h, *inputs)` as a module that owns the weights which the function uses.

    These are the weights of all modules that can be found from the function: the object that a
    method is bound to, the arguments of a `functools.partial`, closure variables, and global
    variables, also those of functions that it calls from the same file. The weights and buffers of
    a module that is found are registered here under new names, and its children become children of
    this module. The found module itself is not a child, since it may be the network that contains
    the layer.

    Args:
        function: called as `function(h, *inputs)`.

    Raises:
        ProblemError: in the first evaluation, if the function uses a tensor that requires a
            gradient and is neither such a weight nor an input: its gradient would be missing.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self._lenders: list[tuple[nn.Module, str]] = []
        self._examined = False
        for position, module in enumerate(dict.fromkeys(_modules(function, {}))):
            self._borrow(module, f"of_{position}_")

    def forward(self, *inputs: Any) -> Any:
        """Evaluate the function at h and the inputs."""
        with self._in_place():
            if self._examined or torch.is_inference_mode_enabled():
                return self.function(*inputs)
            with torch.enable_grad():
                image = self.function(*inputs)
            self._refuse_hidden(image, inputs)
        self._examined = True
        return image

    def extra_repr(self) -> str:
        """The function's name."""
        return getattr(self.function, "__qualname__", type(self.function).__name__)

    def __getstate__(self) -> dict[str, Any]:
        # a copied function may still refer to the original weights, so the copy is checked again
        return {**self.__dict__, "_examined": False}

    def __deepcopy__(self, memo: dict[int, Any]) -> "FunctionCell":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        used = {id(module) for module in _modules(twin.function, {})}
        if not used.issuperset(id(module) for module, _ in twin._lenders):
            raise ConfigurationError(
                f"{self.extra_repr()} cannot be copied, because Python does not copy functions: "
                f"the copy would use the weights of the original. Write the cell as an nn.Module, "
                f"or as a method of one"
            )
        return twin

    def _borrow(self, module: nn.Module, prefix: str) -> None:
        self._lenders.append((module, prefix))
        for name, child in module.named_children():
            self.add_module(prefix + name, child)
        for name, weight in module._parameters.items():
            self.register_parameter(prefix + name, weight)
        for name, buffer in module._buffers.items():
            kept = name not in module._non_persistent_buffers_set
            self.register_buffer(prefix + name, buffer, persistent=kept)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Put this module's weights, buffers and training flag into the found modules for one call.

        A caller, such as `functional_call`, may have swapped them here.
        """
        entries: list[tuple[dict[str, Any], str, Any, dict[str, Any], str]] = [
            (theirs, name, theirs[name], own, prefix + name)
            for module, prefix in self._lenders
            for theirs, own in (
                (module._parameters, self._parameters),
                (module._buffers, self._buffers),
            )
            for name in theirs
            if prefix + name in own
        ]
        flags = [(module, module.training) for module, _ in self._lenders]
        for theirs, name, _, own, longer in entries:
            theirs[name] = own[longer]
        for module, _ in flags:
            module.training = self.training
        try:
            yield
        finally:
            for theirs, name, before, own, longer in entries:
                if own[longer] is before:  # not swapped by a caller: keep a buffer that was updated
                    own[longer] = theirs[name]
                else:
                    theirs[name] = before
            for module, training in flags:
                module.training = training

    def _refuse_hidden(self, image: Any, inputs: tuple[Any, ...]) -> None:
        """Raise if a tensor that requires a gradient is neither a known weight nor an input."""
        given = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
        seen = {get_gradient_edge(x).node for x in (*given, *self.parameters()) if x.requires_grad}
        nodes = {get_gradient_edge(x).node for x in tree_leaves(image) if _tracked(x)}
        while nodes := nodes - seen:
            for node in nodes:
                if (hidden := getattr(node, "variable", None)) is not None:
                    raise ProblemError(
                        f"{self.extra_repr()} uses a tensor of shape {tuple(hidden.shape)} that "
                        f"requires a gradient but would get none, because it is not a weight of a "
                        f"module that the function uses. Pass it as an input, layer(x, tensor), "
                        f"make it a parameter of a module, or detach() it"
                    )
            seen |= nodes
            nodes = {after for node in nodes for after, _ in node.next_functions if after}


def _tracked(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _modules(value: Any, seen: dict[int, Any]) -> Iterator[nn.Module]:
    """The modules that a callable uses, directly or not; `seen` holds the searched values by id."""
    if id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, nn.Module):
        yield value
        return
    for part in _parts(value):
        yield from _modules(part, seen)


def _parts(value: Any) -> list[Any]:
    """The values inside a value that may be modules or use modules."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        held = value.__self__
        own = {} if isinstance(held, nn.Module) else getattr(held, "__dict__", {})
        return [held, *own.values(), value.__func__]
    if isinstance(value, types.FunctionType):
        try:
            around = inspect.getclosurevars(value)
        except ValueError as error:  # an empty cell
            raise ConfigurationError(
                f"{value.__qualname__} uses a variable that has no value yet, so its weights "
                f"cannot be found. Make the layer after that variable is set"
            ) from error
        near = [found for found in around.globals.values() if _near(found, value)]
        return [*around.nonlocals.values(), *near]
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, Mapping):
        return list(value.values())
    called = getattr(type(value), "__call__", None)  # noqa: B004  a method of Python's, or a slot
    return [types.MethodType(called, value)] if isinstance(called, types.FunctionType) else []


def _near(found: Any, function: types.FunctionType) -> bool:
    """Whether to search a global variable; functions of other files, modules and types are not."""
    elsewhere = isinstance(found, types.FunctionType) and found.__module__ != function.__module__
    return not elsewhere and not isinstance(found, types.ModuleType | type)
