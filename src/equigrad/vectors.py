"""Conversion of tensors to one flat vector, and relative distances."""

import cmath
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All entries of several tensors as one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flatten`."""
    parts = vector.split([t.numel() for t in like])
    return [part.view_as(t).to(t.dtype) for part, t in zip(parts, like, strict=True)]


def finite(tensor: Tensor) -> bool:
    """Whether all entries are finite; where their sum is, which one pass tells, they are."""
    return cmath.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def relative(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """`‖one - other‖ / ‖other‖` over all entries; 0 or infinite where `other` is zero."""
    a, b = (flatten([t.detach() for t in tensors]).double() for tensors in (one, other))
    apart, size = (a - b).norm().item(), b.norm().item()
    return apart / size if size else math.inf if apart else 0.0


def mismatch(one: Tensor, other: Tensor) -> float:
    """`‖one - other‖` relative to the larger of the two; 0 if both are zero."""
    size = max(one.norm().item(), other.norm().item())
    return (one - other).norm().item() / size if size else 0.0


def tracked(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy that autograd accepts if it was made under inference mode."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return tensor.clone()
    return tensor
