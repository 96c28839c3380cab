"""Checks of the inputs and labels of a network, and losses summed over samples."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.dropout import _DropoutNd

from equigrad.errors import ProblemError


@contextmanager
def reading(network: nn.Module, x: Tensor) -> Iterator[None]:
    """Turn torch's errors into one that describes the input which the network cannot read.

    Raises:
        ProblemError: x is not finite, or has a shape or type that the network cannot take.
    """
    if not torch.isfinite(x).all():
        raise ProblemError("x holds NaN or infinite values")
    try:
        yield
    except (RuntimeError, IndexError) as error:
        weights = next(network.parameters()).dtype
        raise ProblemError(
            f"{type(network).__name__}, which has weights of {weights}, cannot process x of "
            f"{x.dtype} with shape {tuple(x.shape)} (samples first): {first_line(error)}"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, without torch's details below it."""
    return str(error).partition("\n")[0] or type(error).__name__


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of class labels, summed over samples.

    Raises:
        ProblemError: the labels do not fit the number of samples and classes.
    """
    with labelling(labels, logits):
        return cross_entropy(logits, labels, reduction="sum")


def summed_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error, summed over samples and outputs.

    Raises:
        ProblemError: the targets do not have the shape of the outputs.
    """
    if outputs.shape != targets.shape:
        raise ProblemError(
            f"targets must have the shape of the outputs, {tuple(outputs.shape)}, got "
            f"{tuple(targets.shape)}"
        )
    return 0.5 * (outputs - targets).square().sum()


@contextmanager
def labelling(labels: Tensor, outputs: Tensor) -> Iterator[None]:
    """Turn torch's errors into one that describes labels which do not fit the outputs.

    Args:
        labels: the class of each sample.
        outputs: logits, samples x classes.

    Raises:
        ProblemError: torch finds that they do not fit. On a GPU, a label that is out of range stops
            torch's kernel instead, and torch's own error stands.
    """
    try:
        yield
    except (RuntimeError, IndexError, ValueError) as error:
        range_of = f" from {labels.min()} to {labels.max()}" if labels.numel() else ""
        raise ProblemError(
            f"targets must be a class for each of the {len(outputs)} samples, a whole number "
            f"(torch.long) from 0 to {outputs.shape[-1] - 1}; got {labels.dtype} of shape "
            f"{tuple(labels.shape)}{range_of}"
        ) from error


def draws(module: nn.Module) -> bool:
    """Whether a module has a dropout layer in training mode."""
    return any(isinstance(part, _DropoutNd) and part.training for part in module.modules())
