"""Copies of modules, also of those that `copy.deepcopy` refuses."""

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def copied(module: Module) -> Module:
    """A deep copy of a module, whatever it holds beside its parameters and buffers.

    Tensors that were computed (activations that a forward pass has kept, weights that a hook
    computes anew) are copied without their graph. What has no copy at all, such as a lock, is
    shared.

    Args:
        module: to be copied; is not changed.
    """
    memo: dict[int, Any] = {}
    for value in _attributes(module):
        memo.update((id(t), t.detach().clone()) for t in tensors_in(value) if not t.is_leaf)
    try:
        return copy.deepcopy(module, dict(memo))
    except (TypeError, NotImplementedError):  # what cannot be pickled has no copy either
        for value in _attributes(module):
            try:
                copy.deepcopy(value, dict(memo))
            except (TypeError, NotImplementedError):
                memo[id(value)] = value
        return copy.deepcopy(module, memo)


def held_parameters(module: nn.Module) -> Iterator[tuple[Any, Any, nn.Parameter]]:
    """Parameters that modules within hold in attributes, beside where they register them.

    Args:
        module: is looked into; torch's own modules hold none.

    Yields:
        The container, the key that `container[key] = tensor` replaces the parameter by, and the
        parameter. Tuples are rebuilt where one of theirs is replaced.
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
    """The items of a tuple, to be replaced one by one."""

    def __init__(self, owner: Any, key: Any) -> None:
        self._owner, self._key = owner, key

    def __getitem__(self, place: int) -> Any:
        return self._owner[self._key][place]

    def __setitem__(self, place: int, item: Any) -> None:
        items = self._owner[self._key]
        self._owner[self._key] = (*items[:place], item, *items[place + 1 :])


def _attributes(module: nn.Module) -> Iterator[Any]:
    """What the modules within hold beside parameters, buffers and modules."""
    own = ("_parameters", "_buffers", "_modules")
    for part in module.modules():
        yield from (v for n, v in vars(part).items() if n not in own and not _hooks(n))


def _hooks(name: str) -> bool:
    return name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in mappings, lists and tuples, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
