"""Checks that all ranks have the same parameters, settings and batches."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from equigrad.errors import ProblemError
from equigrad.parallel.shards import mesh_of

Mark = tuple[Any, ...]
"""The shape, dtype and checksum of a tensor."""


@dataclass(frozen=True)
class Likeness:
    """A summary of what must be the same on all ranks, small enough to be sent.

    Attributes:
        params: marks of φ.
        meta_params: marks of θ.
        constants: marks of frozen parameters, and of buffers except those of batch normalisation,
            which depend on each rank's share of the data.
        batches: number of mini-batches of each loss.
        seed: seed of the random numbers; that of the first rank is used.
        examples: number of examples in the first mini-batch of each loss, if it is known.
    """

    params: dict[str, Mark]
    meta_params: dict[str, Mark]
    constants: dict[str, Mark]
    batches: dict[str, int]
    seed: int
    examples: dict[str, int]

    @staticmethod
    def marks(tensors: Mapping[str, Tensor]) -> dict[str, Mark]:
        """Marks of named tensors."""
        return {name: _mark(tensor) for name, tensor in tensors.items()}

    @staticmethod
    def constants_of(modules: Iterable[nn.Module], given: Iterable[Tensor]) -> dict[str, Tensor]:
        """The tensors that modules compute with, besides those that they are called with."""
        handed = {t.untyped_storage().data_ptr() for t in given}
        return {
            f"{i}.{path}.{name}": t
            for i, module in enumerate(modules)
            for path, part in module.named_modules()
            for name, t in _constants(part)
            if t.untyped_storage().data_ptr() not in handed
        }


def require_alike(said: list[Likeness]) -> None:
    """Raise a `ProblemError` that names the first difference between two ranks."""
    first = said[0]
    for rank, other in enumerate(said):
        for field in fields(Likeness):
            if field.name in ("seed", "examples"):
                continue
            here, there = getattr(first, field.name), getattr(other, field.name)
            different = [n for n in (*here, *there) if here.get(n) != there.get(n)]
            if different:
                name = different[0]
                raise ProblemError(_said(field.name, name, rank, here.get(name), there.get(name)))


def _said(what: str, name: str, rank: int, here: Any, there: Any) -> str:
    if what == "batches":
        return (
            f"rank 0 has {here} mini-batches of {name}, but rank {rank} has {there}. Give every "
            f"rank the same number, for example by a DistributedSampler with drop_last=True"
        )
    what = "module tensor" if what == "constants" else what
    if here is None or there is None:
        has, lacks = (rank, 0) if here is None else (0, rank)
        return f"{what} {name!r} exists on rank {has}, but not on rank {lacks}"
    if here[:2] != there[:2]:
        return f"{what} {name!r} has {_kind(here)} on rank 0, but {_kind(there)} on rank {rank}"
    return (
        f"{what} {name!r} differs between rank 0 and rank {rank}, but all ranks must start with "
        f"the same values. Use the same seed on all ranks before it is made, load it from a file, "
        f"or send it from one rank to all by torch.distributed.broadcast"
    )


def _kind(mark: Mark) -> str:
    return f"shape {mark[0]} of {mark[1]}"


def _mark(tensor: Tensor) -> Mark:
    """Checksums of a tensor's bits, which do not depend on the order of summation."""
    bits = tensor.detach().reshape(-1)
    if bits.is_complex():
        bits = torch.view_as_real(bits).reshape(-1)
    if bits.dtype == torch.bool:
        bits = bits.to(torch.uint8)
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = bits.contiguous().view(size[bits.element_size()])
    sums = [int(bits[::stride].sum(dtype=torch.int64)) for stride in (1, 2, 3)]
    return tuple(tensor.shape), str(tensor.dtype), *sums


def _constants(part: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own frozen parameters, and buffers except those of batch normalisation."""
    found: list[tuple[str, Tensor]] = [
        (n, p) for n, p in part.named_parameters(recurse=False) if not p.requires_grad
    ]
    if not isinstance(part, nn.modules.batchnorm._BatchNorm):
        found += part.named_buffers(recurse=False)
    return [(n, t) for n, t in found if not t.is_meta and mesh_of(t) is None]
