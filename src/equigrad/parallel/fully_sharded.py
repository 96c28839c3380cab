"""Modules that torch's `fully_shard` (FSDP2) has spread over processes."""

import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from equigrad.errors import ProblemError
from equigrad.parallel.shards import mesh_of, whole

HOOKS = ("torch.distributed.fsdp", "torch.distributed._composable")
"""Where the hooks come from that put a module's own shards in the place of params."""


def is_fully_sharded(part: nn.Module) -> bool:
    """Whether `fully_shard` has made this module, or one of its parts, lie on processes."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(part, kind)


def mesh_under(part: nn.Module) -> Any:
    """The mesh that `fully_shard` was given; None where the part has no parameters of its own.

    Raises:
        ProblemError: the mesh has several dimensions, or the module computes otherwise than its
            parameters are kept.
    """
    state: Any = part._get_fsdp_state()  # pyright: ignore  # there is no public way
    one = getattr(state, "_fsdp_param_group", None)  # before torch 2.13
    groups = getattr(state, "_fsdp_param_groups", None) or ([] if one is None else [one])
    for group in groups:
        _refuse_policies(part, group)
        return group.mesh_info.mesh
    return None


def _refuse_policies(part: nn.Module, group: Any) -> None:
    mesh, name = group.mesh_info.mesh, type(part).__name__
    if mesh.ndim > 1:
        raise ProblemError(
            f"{name} is sharded over a mesh of {mesh.ndim} dimensions, {mesh}; call fully_shard "
            f"with a one-dimensional mesh"
        )
    policy = group.mp_policy
    kinds = [policy.param_dtype, policy.reduce_dtype, policy.output_dtype]
    if any(kind is not None for kind in kinds):
        raise ProblemError(
            f"{name} has {policy}, which would be ignored, because equigrad computes with whole "
            f"parameters in their own dtype. Call fully_shard without mp_policy, and call "
            f"equigrad under torch.autocast"
        )
    if "CPU" in type(group.offload_policy).__name__:
        raise ProblemError(
            f"{name} keeps its shards on the CPU (CPUOffloadPolicy), so equigrad would compute "
            f"there with whole parameters. Call fully_shard without offload_policy"
        )


@contextmanager
def unsharded(parts: Iterable[nn.Module]) -> Iterator[None]:
    """While modules compute with whatever parameters they are handed, and whole ones of their own.

    Shards are put together once and put back afterwards, the same tensors in the same places; the
    hooks that gather and free them are passed by.
    """
    swapped: list[tuple[Any, str, Any]] = []
    hooked: list[tuple[Any, str, Any]] = []
    parts, found = list(parts), dict[int, nn.Parameter]()  # tied weights stay one tensor
    try:
        for owner in dict.fromkeys(m for part in parts for m in part.modules()):
            for name, p in owner._parameters.items():
                if p is not None and mesh_of(p) is not None:
                    swapped.append((owner, name, p))
                    if id(p) not in found:
                        found[id(p)] = _whole_parameter(p)
                    owner._parameters[name] = found[id(p)]
        for part in parts:
            for kind in ("_forward_pre_hooks", "_forward_hooks"):
                hooks = getattr(part, kind)
                hooked.append((part, kind, hooks))
                setattr(part, kind, _without_own(hooks))
        yield
    finally:
        for part, kind, hooks in reversed(hooked):
            setattr(part, kind, hooks)
        for owner, name, p in swapped:
            owner._parameters[name] = p


def _whole_parameter(shard: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(whole(shard.detach()), requires_grad=shard.requires_grad)


def _without_own(hooks: "OrderedDict[int, Any]") -> "OrderedDict[int, Any]":
    """Hooks but for those of `fully_shard`; a part that it was not called on has none of them."""
    return OrderedDict(
        (key, hook)
        for key, hook in hooks.items()
        if not str(getattr(hook, "__module__", "")).startswith(HOOKS)
    )
