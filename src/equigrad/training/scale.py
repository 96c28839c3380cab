"""By what numbers are standardised."""

import torch
from torch import Tensor

from equigrad.errors import DataError


def mean_and_scale(values: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation along the first dimension; 1 for what is constant.

    What is constant is told by its least and greatest value: rounding can leave a deviation of
    1e-17, which would blow up every other value.

    Args:
        values: rows first, at least one.
        what: they are, for the error message.

    Raises:
        DataError: they are too large for a deviation.

    Example:
        >>> mean_and_scale(torch.tensor([[1.0, 0.1], [3.0, 0.1]]), "numbers")
        (tensor([2.0000, 0.1000]), tensor([1., 1.]))
    """
    deviation, mean = torch.std_mean(values, dim=0, correction=0)
    constant = values.amin(0) == values.amax(0)
    mean, scale = mean.where(~constant, values[0]), deviation.where(~constant, 1.0)
    if not scale.isfinite().all():
        raise DataError(f"{what}: too large to standardise, up to {values.abs().max():g}")
    return mean, scale
