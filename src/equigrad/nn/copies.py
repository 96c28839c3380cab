"""Copies of modules, also of those that `copy.deepcopy` refuses."""

import copy
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
        memo.update((id(t), t.detach().clone()) for t in _tensors(value) if not t.is_leaf)
    try:
        return copy.deepcopy(module, dict(memo))
    except (TypeError, NotImplementedError):  # what cannot be pickled has no copy either
        for value in _attributes(module):
            try:
                copy.deepcopy(value, dict(memo))
            except (TypeError, NotImplementedError):
                memo[id(value)] = value
        return copy.deepcopy(module, memo)


def _attributes(module: nn.Module) -> Iterator[Any]:
    """What the modules within hold beside parameters, buffers and modules."""
    own = ("_parameters", "_buffers", "_modules")
    for part in module.modules():
        yield from (v for n, v in vars(part).items() if n not in own and not _hooks(n))


def _hooks(name: str) -> bool:
    return name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
