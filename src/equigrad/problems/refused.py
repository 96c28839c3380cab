"""Checks that refuse modules, tensors and functions which do not work in a meta-gradient."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from equigrad.errors import ProblemError
from equigrad.parallel import is_data_parallel, is_fully_sharded, mesh_of, processes


def refuse_module(module: nn.Module, *, data_parallel: bool = False) -> None:
    """Raise a `ProblemError` for a module that changes its own weights or spans several processes.

    Args:
        module: a module that a problem's functions call.
        data_parallel: whether it may be wrapped by `DistributedDataParallel` or `fully_shard`.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag):
            _refuse_renormed(name, part)
        served = data_parallel and (is_data_parallel(part) or is_fully_sharded(part))
        if not served and (processes(part) > 1 or is_fully_sharded(part)):
            raise ProblemError(
                f"{type(part).__name__} {name or 'itself'!r} is shared by {processes(part)} "
                f"processes, and an estimator for this problem would see only this process's "
                f"share of the data: DistributedDataParallel averages .grad, which equigrad does "
                f"not use, and FSDP replaces the params that a function is given by its own "
                f"shards. Pass the module before it is wrapped, to "
                f"Bilevel(group=torch.distributed.group.WORLD)"
            )
        for local, p in part.named_parameters(recurse=False):
            if not data_parallel:
                refuse_shards(f"{name}.{local}".lstrip("."), p)


def refuse_tensor(name: str, tensor: Tensor) -> None:
    """Raise a `ProblemError` for a tensor that cannot settle or be learned.

    Args:
        name: name of the tensor, for the message.
        tensor: φ or θ.
    """
    why = None
    if tensor.is_complex():
        why = (
            "is complex, and a loss has no gradient to descend for complex numbers. Pass "
            "torch.view_as_real of it"
        )
    elif not tensor.is_floating_point():
        why = f"has dtype {tensor.dtype}, which has no gradient. Use a floating-point tensor"
    elif tensor.is_meta:
        why = (
            "is on the meta device, where tensors have shapes but no values. Give it values with "
            ".to_empty(…) and an initialisation"
        )
    elif forward_ad.unpack_dual(tensor).tangent is not None:
        why = (
            "has a tangent (torch.autograd.forward_ad), which would be lost. Differentiate in "
            "reverse mode, by equigrad.argmin or equigrad.fixed_point"
        )
    elif tensor.layout != torch.strided:
        why = f"has layout {tensor.layout}, which is not supported. Call .to_dense() on it"
    if why is not None:
        raise ProblemError(f"{name} {why}")


def refuse_shards(name: str, tensor: Tensor) -> None:
    """Raise a `ProblemError` for a tensor that is spread over several processes (a `DTensor`)."""
    if (mesh := mesh_of(tensor)) is not None and mesh.size() > 1:
        raise ProblemError(
            f"{name!r} is a {type(tensor).__name__} that is sharded over {mesh.size()} processes, "
            f"and each process would optimise its own shard alone. Gather it with .full_tensor()"
        )


def given(function: Any) -> Any:
    """The user's own function, inside the wrappers for autocast and held samples."""
    while hasattr(function, "function"):
        function = function.function
    return function


def refuse_call(name: str, function: Callable[..., Any], batches: str | None, count: int) -> None:
    """Raise a `ProblemError` if a function cannot be called with a number of arguments.

    Args:
        name: name of the function.
        function: the user's function.
        batches: the argument of the problem that gives it batches, if there is one.
        count: number of arguments: params, meta_params, and a batch if there are batches.
    """
    try:
        signature = inspect.signature(given(function))
    except (TypeError, ValueError):  # a built-in function may have no signature
        return
    try:
        signature.bind(*range(count))
    except TypeError:
        words = ("params", "meta_params", "batch")[:count]
        why, mend = "", "change it to accept these arguments"
        if count == 3:
            why = f" because {batches} are given"
            mend = f"add a third parameter for the batch, or leave out {batches}"
        elif batches is not None and len(signature.parameters) == 3:
            why = f" because no {batches} are given"
            mend = f"pass {batches}, or remove the third parameter"
        raise ProblemError(
            f"{name} is called as {name}({', '.join(words)}){why}, but its signature is "
            f"{signature}: {mend}"
        ) from None


def _refuse_renormed(name: str, part: nn.Embedding | nn.EmbeddingBag) -> None:
    if part.max_norm is not None and part.weight.requires_grad:
        raise ProblemError(
            f"{type(part).__name__} {name!r} has max_norm={part.max_norm:g}, so it rescales long "
            f"rows of its weight in place in every forward pass, and the inner problem does not "
            f"converge to a point where the gradient is zero. Set max_norm=None and add a penalty "
            f"on long rows to the inner loss, or use a FixedPoint whose map projects the rows"
        )
