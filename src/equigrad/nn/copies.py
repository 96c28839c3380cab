"""Deep copies of modules, including modules that `copy.deepcopy` refuses."""

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def copied(module: Module) -> Module:
    """A deep copy of a module, whatever its attributes hold besides parameters and buffers.

    Tensors that were computed (activations kept by a forward pass, weights recomputed by a hook)
    are copied without their graph. Attributes that cannot be copied, such as a lock, are shared.

    Args:
        module: the module to copy; it is not changed.
    """
    memo: dict[int, Any] = {}
    for value in _attributes(module):
        memo.update((id(t), t.detach().clone()) for t in tensors_in(value) if not t.is_leaf)
    try:
        return copy.deepcopy(module, dict(memo))
    except (TypeError, NotImplementedError):  # deepcopy refuses what cannot be pickled
        for value in _attributes(module):
            try:
                copy.deepcopy(value, dict(memo))
            except (TypeError, NotImplementedError):
                memo[id(value)] = value
        return copy.deepcopy(module, memo)


def held_parameters(module: nn.Module) -> Iterator[tuple[Any, Any, nn.Parameter]]:
    """Parameters that submodules hold in plain attributes, besides where they are registered.

    Args:
        module: the module to search; torch's own modules hold none.

    Yields:
        A container, the key such that `container[key] = tensor` replaces the parameter, and the
        parameter. A tuple is rebuilt when one of its items is replaced.
    """
    for part in module.modules():
        own = vars(part)
        for name in [n for n in own if n not in vars(nn.Module())]:
            yield from _held(own, name, own[name])


def _held(owner: Any, key: Any, value: Any, depth: int = 3) -> Iterator[Any]:
    if isinstance(value, nn.Parameter):
        yield owner, key, value
    elif not depth:
        return
    elif isinstance(value, functools.partial):
        yield from _held(owner, key, value.keywords, depth - 1)
    elif isinstance(value, dict):
        for name, item in list(value.items()):
            yield from _held(value, name, item, depth - 1)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _held(value, place, item, depth - 1)
    elif type(value) is tuple:
        for place, item in enumerate(value):
            yield from _held(_InTuple(owner, key), place, item, depth - 1)


class _InTuple:
    """A tuple held by an owner, whose items can be replaced one by one."""

    def __init__(self, owner: Any, key: Any) -> None:
        self._owner, self._key = owner, key

    def __getitem__(self, place: int) -> Any:
        return self._owner[self._key][place]

    def __setitem__(self, place: int, item: Any) -> None:
        items = self._owner[self._key]
        self._owner[self._key] = (*items[:place], item, *items[place + 1 :])


def _attributes(module: nn.Module) -> Iterator[Any]:
    """The attributes of all submodules other than parameters, buffers, modules and hooks."""
    own = ("_parameters", "_buffers", "_modules")
    for part in module.modules():
        yield from (v for n, v in vars(part).items() if n not in own and not _hooks(n))


def _hooks(name: str) -> bool:
    return name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
