"""The networks of `equigrad run equilibrium`, built from plain numbers that a file can hold.

Each takes images of a given shape, channels x height x width.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch.nn import (
    AdaptiveAvgPool2d,
    Conv2d,
    Flatten,
    GroupNorm,
    Linear,
    MaxPool2d,
    Module,
    Sequential,
)

from equigrad.errors import ConfigurationError
from equigrad.nn.equilibrium_network import EquilibriumNetwork
from equigrad.nn.equilibrium_rnn import EquilibriumRNN
from equigrad.nn.hopfield import Hopfield
from equigrad.nn.learned_feedback import with_learned_feedback
from equigrad.nn.networks import tanh_network
from equigrad.nn.relaxing import Relaxing
from equigrad.nn.residual_cell import ResidualCell

GROUPS = 8
"""Number of groups in which a convolutional equilibrium network normalises its channels."""


Feedback = Literal["transposed", "layerwise", "direct"]


def relaxing_tanh_network(
    shape: Sequence[int], hidden: Sequence[int], outputs: int, *, feedback: Feedback = "transposed"
) -> Relaxing:
    """A feed-forward network of tanh layers whose states relax.

    Args:
        shape: shape of an image, which is flattened.
        hidden: widths of the hidden layers.
        outputs: number of outputs.
        feedback: the weights that carry a control back: the `transposed` forward weights; or
            learned ones, `layerwise` (`with_learned_feedback`) or `direct` from the outputs to each
            hidden layer, zero at first (`LinearFeedback`).

    Raises:
        ConfigurationError: a width < 1.
    """
    model = tanh_network(math.prod(shape), hidden, outputs)
    layers = with_learned_feedback(model) if feedback == "layerwise" else model
    direct = {str(i): torch.zeros(width, outputs) for i, width in enumerate(hidden)}
    return Relaxing(
        Sequential(Flatten(), *layers.children()),
        feedback=direct if feedback == "direct" else None,
    )


def recurrent_tanh_network(
    shape: Sequence[int], hidden: Sequence[int], outputs: int
) -> EquilibriumRNN:
    """An `EquilibriumRNN` with one hidden layer.

    Raises:
        ConfigurationError: several hidden layers, or none.
    """
    return EquilibriumRNN(math.prod(shape), single(hidden), outputs)


def hopfield_network(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> Hopfield:
    """A fully connected `Hopfield` network."""
    sizes = [math.prod(shape), *hidden, outputs]
    first, *others = (Linear(*pair) for pair in pairwise(sizes))
    return Hopfield([Sequential(Flatten(), first), *others])


def convolutional_equilibrium_network(
    shape: Sequence[int], hidden: Sequence[int], outputs: int
) -> EquilibriumNetwork:
    """A `ResidualCell` that settles under an image, with logits linear in its pooled state.

    A convolution of stride 2 and a pooling by two reduce height and width to a quarter; the settled
    channels are averaged to 4 x 4 places.

    Args:
        shape: shape of an image.
        hidden: a single number of channels, a multiple of 8.
        outputs: number of classes.

    Raises:
        ConfigurationError: several numbers of channels, or one that is not a multiple of 8.

    Example:
        >>> net = convolutional_equilibrium_network((3, 32, 32), (16,), 10)
        >>> sum(p.numel() for p in net.parameters())
        8522
    """
    channels = single(hidden)
    cell = ResidualCell(channels, groups=GROUPS)
    encoder = Sequential(
        Conv2d(shape[0], channels, 5, stride=2, padding=2),
        GroupNorm(GROUPS, channels),
        MaxPool2d(2),
    )
    readout = Sequential(AdaptiveAvgPool2d(4), Flatten(), Linear(16 * channels, outputs))
    return EquilibriumNetwork(encoder, cell, readout)


def convolutional_hopfield_network(
    shape: Sequence[int], hidden: Sequence[int], outputs: int
) -> Hopfield:
    """A `Hopfield` network of convolutions with pooling by two and a cross-entropy readout.

    Args:
        shape: shape of an image.
        hidden: number of feature maps of each layer of neurons.
        outputs: number of classes.

    Raises:
        ConfigurationError: there are more layers than times that the image can be halved.
    """
    channels, height, width = shape
    left = height >> len(hidden), width >> len(hidden)
    if not min(left):
        raise ConfigurationError(
            f"an image of {height} x {width} is too small for {len(hidden)} hidden layers, each "
            f"of which halves height and width; use fewer layers"
        )
    layers: list[Module] = [
        Sequential(Conv2d(before, maps, 3, padding=1), MaxPool2d(2))
        for before, maps in pairwise([channels, *hidden])
    ]
    last = Linear(hidden[-1] * math.prod(left), outputs)
    return Hopfield([*layers, Sequential(Flatten(), last)], readout="cross-entropy")


def single(hidden: Sequence[int]) -> int:
    """The width of the only hidden layer.

    Raises:
        ConfigurationError: there is not exactly one hidden layer.
    """
    if len(hidden) != 1:
        raise ConfigurationError(
            f"this network has a single hidden layer, got hidden widths {tuple(hidden)}"
        )
    return hidden[0]
