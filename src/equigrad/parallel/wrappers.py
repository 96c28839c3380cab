"""Wrappers of modules that belong to several processes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from equigrad.errors import ProblemError
from equigrad.parallel.fully_sharded import is_fully_sharded, mesh_under, unsharded


def is_group(value: object) -> bool:
    """Whether this is a group of processes that contains this one."""
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def processes(part: nn.Module) -> int:
    """The number of processes that share a module wrapped by torch, or by a class made from it."""
    wraps = any(
        kind.__module__.startswith(
            ("torch.nn.parallel.distributed", "torch.distributed", "deepspeed")
        )
        for kind in type(part).__mro__
    )
    if not wraps or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size(getattr(part, "process_group", None))


def is_data_parallel(part: nn.Module) -> bool:
    """Whether this is a `DistributedDataParallel` module, or one of a class made from it."""
    return dist.is_available() and isinstance(part, nn.parallel.DistributedDataParallel)


def data_parallel(module: nn.Module) -> list[Any]:
    """The parts of a module whose own hooks see to several processes, or replace params.

    Those in `DistributedDataParallel` over several processes, and those of `fully_shard`.

    Raises:
        ProblemError: one is wrapped twice, or is sharded in a way that is not supported.
    """
    found: list[Any] = [p for p in module.modules() if is_data_parallel(p) and processes(p) > 1]
    sharded = [p for p in module.modules() if is_fully_sharded(p)]
    if found and sharded:
        raise ProblemError(
            f"{type(found[0]).__name__} and fully_shard are used in the same module, but both "
            f"average over processes. Use only one of them"
        )
    for part in found:
        if any(inner is not part and inner in found for inner in part.modules()):
            raise ProblemError(
                f"{type(part).__name__} contains another {type(part).__name__}, so the module was "
                f"wrapped twice. Wrap it once"
            )
    return found + sharded


def group_of(given: Any, wrapped: Iterable[Any]) -> Any:
    """The group of processes that a problem belongs to; None for a single process.

    Args:
        given: the user's group, or None.
        wrapped: the data-parallel modules that the problem calls.

    Raises:
        ProblemError: they belong to different groups, or to a mesh of several dimensions.
    """
    groups = [group for group in (given, *map(_group, wrapped)) if group is not None]
    ranks = {tuple(dist.get_process_group_ranks(group)) for group in groups}
    if len(ranks) > 1:
        raise ProblemError(
            f"modules and group= belong to different groups of processes, "
            f"{sorted(map(list, ranks))}. Wrap all modules with the group that is passed as group="
        )
    return groups[0] if groups and len(ranks.pop()) > 1 else None


def _group(part: Any) -> Any:
    if is_data_parallel(part):
        return part.process_group
    mesh = mesh_under(part)
    return None if mesh is None else mesh.get_group()


@contextmanager
def inside(wrapped: Iterable[Any]) -> Iterator[None]:
    """A context in which data-parallel modules just call the modules that they wrap.

    Their reducers wait for gradients to be accumulated, which never happens here, and would
    broadcast the buffers of rank 0. Modules of
    `fully_shard` compute with full parameters.
    """
    wrapped = list(wrapped)
    own = [(w, vars(w).get("forward")) for w in wrapped if is_data_parallel(w)]
    for w, _ in own:
        w.forward = _Inside(w)
    try:
        with unsharded(w for w in wrapped if is_fully_sharded(w)):
            yield
    finally:
        for w, forward in own:
            if forward is None:
                del w.forward
            else:
                w.forward = forward


class _Inside:
    """Calls the module inside a data-parallel module, on the device that it moves inputs to."""

    def __init__(self, wrapper: Any) -> None:
        self._module = wrapper.module
        self._device = wrapper.device if wrapper.device_ids else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._device is not None:
            args, kwargs = tree_map_only(Tensor, self._to_device, (args, kwargs))
        return self._module(*args, **kwargs)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)
