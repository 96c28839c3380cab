"""Several tensors combined into a matrix with one row for each sample."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rows(tensors: Sequence[Tensor], samples: bool) -> Tensor:
    """The tensors as one row for each sample, or one row in all; a single tensor is not copied."""
    count = len(tensors[0]) if samples else 1
    shaped = [t.reshape(count, -1) for t in tensors]
    return shaped[0] if len(shaped) == 1 else torch.cat(shaped, dim=1)


def at_least_single(t: Tensor) -> Tensor:
    """The tensor in at least single precision, which matrix factorisations need."""
    return t.float() if torch.finfo(t.dtype).bits < 32 else t


def move_rows(tensors: Sequence[Tensor], step: Tensor) -> None:
    """Add a step, in the layout of `rows`, to the tensors in place."""
    parts = step.split([t.numel() // len(step) for t in tensors], dim=1)
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.add_(part.reshape(tensor.shape))
