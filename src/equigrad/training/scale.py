"""Mean and scale for standardising numbers."""

from torch import Tensor

from equigrad.errors import DataError


def mean_and_scale(values: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation along the first dimension; 1 for a constant column.

    A column is constant if its minimum equals its maximum: rounding can leave a deviation of 1e-17,
    by which other values must not be divided.

    Args:
        values: one row for each example, at least one.
        what: what the values are, for the error message.

    Raises:
        DataError: the values are too large for their deviation to be computed.

    Example:
        >>> import torch
        >>> mean_and_scale(torch.tensor([[1.0, 0.1], [3.0, 0.1]]), "numbers")
        (tensor([2.0000, 0.1000]), tensor([1., 1.]))
    """
    mean = values.mean(0)
    deviation = (values - mean).square().mean(0).sqrt()  # torch.std_mean takes five times as long
    constant = values.amin(0) == values.amax(0)
    mean, scale = mean.where(~constant, values[0]), deviation.where(~constant, 1.0)
    if not scale.isfinite().all():
        raise DataError(
            f"{what}: values up to {values.abs().max():g} are too large to be standardised"
        )
    return mean, scale
