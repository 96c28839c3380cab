"""The networks of the experiments, with PyTorch's default start."""

from collections.abc import Sequence
from itertools import pairwise

from torch.nn import (
    BatchNorm1d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    Module,
    ReLU,
    Sequential,
    Tanh,
)

from equigrad.errors import ConfigurationError


def tanh_network(inputs: int, hidden: Sequence[int], outputs: int) -> Sequential:
    """Linear layers with tanh between them.

    Args:
        inputs: number of inputs.
        hidden: widths of the hidden layers.
        outputs: number of outputs, which are linear.

    Raises:
        ConfigurationError: a width < 1.

    Example:
        >>> sum(p.numel() for p in tanh_network(784, [256] * 5, 10).parameters())
        466698
    """
    widths = [inputs, *hidden]
    if min(*widths, outputs) < 1:
        raise ConfigurationError(f"hidden widths must be at least 1, got {tuple(hidden)}")
    layers: list[Module] = []
    for wide, narrow in pairwise(widths):
        layers += [Linear(wide, narrow), Tanh()]
    return Sequential(*layers, Linear(widths[-1], outputs))


def lenet5(*, running_statistics: bool = False) -> Sequential:
    """LeNet-5 for 3 × 32 × 32 images, with batch normalisation before each ReLU.

    LeCun et al. 1998, as Zucchet et al. (Methods) modify it: two convolutions of 5 × 5, each with
    a pooling by two, then layers of 120, 84 and 10 units.

    Args:
        running_statistics: whether normalisation keeps running statistics, for use in `eval` mode.
            Without, it takes those of the batch in either mode: the network has no buffers, and a
            loss is a function of its parameters alone, but what it says of an image depends on the
            images beside it (it is transductive).

    Example:
        >>> import torch
        >>> lenet5()(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    keep = running_statistics
    return Sequential(
        Conv2d(3, 6, 5),
        BatchNorm2d(6, track_running_stats=keep),
        ReLU(),
        MaxPool2d(2),
        Conv2d(6, 16, 5),
        BatchNorm2d(16, track_running_stats=keep),
        ReLU(),
        MaxPool2d(2),
        Flatten(),
        Linear(400, 120),
        BatchNorm1d(120, track_running_stats=keep),
        ReLU(),
        Linear(120, 84),
        BatchNorm1d(84, track_running_stats=keep),
        ReLU(),
        Linear(84, 10),
    )
