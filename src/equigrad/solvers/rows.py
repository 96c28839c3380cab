"""Several tensors as the rows of one: a row a sample."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rows(tensors: Sequence[Tensor], samples: bool) -> Tensor:
    """A row a sample, or a single row; shares memory with a single tensor."""
    count = len(tensors[0]) if samples else 1
    shaped = [t.reshape(count, -1) for t in tensors]
    return shaped[0] if len(shaped) == 1 else torch.cat(shaped, dim=1)


def at_least_single(t: Tensor) -> Tensor:
    """In a precision that matrices can be factored in, which half precision is not."""
    return t.float() if torch.finfo(t.dtype).bits < 32 else t


def move_rows(tensors: Sequence[Tensor], step: Tensor) -> None:
    """Add what `rows` would give for a step to the tensors, in place."""
    parts = step.split([t.numel() // len(step) for t in tensors], dim=1)
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.add_(part.reshape(tensor.shape))
