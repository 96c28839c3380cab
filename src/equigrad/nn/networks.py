"""The feed-forward networks of the experiments, with PyTorch's default initialisation."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

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

from equigrad.fields import Count, at_least, expect, require


def tanh_network(inputs: int, hidden: Sequence[int], outputs: int) -> Sequential:
    """Linear layers with tanh between them.

    Args:
        inputs: number of inputs.
        hidden: widths of the hidden layers.
        outputs: number of linear outputs.

    Raises:
        ConfigurationError: a width < 1.

    Example:
        >>> sum(p.numel() for p in tanh_network(784, [256] * 5, 10).parameters())
        466698
    """
    widths = [inputs, *hidden]
    expect(Count, inputs=inputs, outputs=outputs)
    expect(tuple[Count, ...], hidden=tuple(hidden))
    layers: list[Module] = []
    for wide, narrow in pairwise(widths):
        layers += [Linear(wide, narrow), Tanh()]
    return Sequential(*layers, Linear(widths[-1], outputs))


def lenet5(
    *,
    channels: int = 3,
    side: int = 32,
    outputs: int = 10,
    normalise: bool = True,
    running_statistics: bool = False,
) -> Sequential:
    """LeNet-5 with batch normalisation and ReLUs, by default for 3 × 32 × 32 images.

    LeCun et al. 1998, as Zucchet et al. (Methods) modify it: two convolutions of 5 × 5, each with
    a pooling by two, then layers of 120, 84 and 10 units.

    Args:
        channels: channels of an image.
        side: its height and width, at least 16.
        outputs: number of linear outputs.
        normalise: whether there is batch normalisation before each ReLU. Without it, the output for
            an image does not depend on other images.
        running_statistics: whether normalisation keeps running statistics, for use in `eval` mode.
            Without them, it uses the statistics of the batch in either mode: the network has no
            buffers, and its loss is a function of its parameters alone, but the output for an image
            depends on the other images of the batch (it is transductive).

    Raises:
        ConfigurationError: side < 16, which leaves nothing after the second pooling.

    Example:
        >>> import torch
        >>> lenet5()(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    expect(Annotated[int, at_least(16)], side=side)
    left = ((side - 4) // 2 - 4) // 2

    def relu(norm: type[Module], features: int) -> list[Module]:
        if not normalise:
            return [ReLU()]
        return [norm(features, track_running_stats=running_statistics), ReLU()]

    return Sequential(
        Conv2d(channels, 6, 5),
        *relu(BatchNorm2d, 6),
        MaxPool2d(2),
        Conv2d(6, 16, 5),
        *relu(BatchNorm2d, 16),
        MaxPool2d(2),
        Flatten(),
        Linear(16 * left * left, 120),
        *relu(BatchNorm1d, 120),
        Linear(120, 84),
        *relu(BatchNorm1d, 84),
        Linear(84, outputs),
    )


def conv4(
    *,
    filters: int = 64,
    channels: int = 1,
    side: int = 28,
    outputs: int = 5,
    pooling: bool = True,
) -> Sequential:
    """Four blocks of a 3 × 3 convolution, batch normalisation and ReLU, with a linear readout.

    The network of few-shot learning (Vinyals et al. 2016; Finn, Abbeel, Levine 2017). It keeps no
    running statistics.

    Args:
        filters: number of filters of each convolution.
        channels: channels of an image.
        side: its height and width.
        outputs: number of linear outputs.
        pooling: whether to halve the image by max-pooling after each block, as Zucchet et al. do;
            otherwise by convolutions of stride 2, as Finn et al. do.

    Raises:
        ConfigurationError: filters < 1, or images too small to be halved four times.

    Example:
        >>> import torch
        >>> conv4(filters=8)(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 5])
    """
    expect(Count, filters=filters, side=side)
    require(
        side >= 16 or not pooling,
        f"the side of an image must be at least 16 with pooling, got {side}; use larger images, "
        f"or pooling=False",
    )
    layers: list[Module] = []
    for inputs in (channels, filters, filters, filters):
        layers += [
            Conv2d(inputs, filters, 3, padding=1, stride=1 if pooling else 2),
            BatchNorm2d(filters, track_running_stats=False),
            ReLU(),
        ]
        if pooling:
            layers.append(MaxPool2d(2))
        side = side // 2 if pooling else -(-side // 2)
    return Sequential(*layers, Flatten(), Linear(filters * side * side, outputs))
