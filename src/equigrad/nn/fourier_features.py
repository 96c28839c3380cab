"""Fourier features: what a network is told of a place."""

import math

import torch
from torch import Tensor, nn

from equigrad.errors import ConfigurationError


class FourierFeatures(nn.Module):
    r"""Sines and cosines of places, of random frequencies (Tancik et al. 2020).

        γ(x) = [sin πFx, cos πFx],    F_ij ~ N(0, frequency²)

    A network of places alone learns what varies slowly and little else; of these features it
    learns the faster, the larger `frequency` is. An axis from -1 to 1 has as many cycles as its
    frequency.

    Args:
        inputs: numbers of a place.
        features: frequencies; there are twice as many outputs.
        frequency: their standard deviation.

    Attributes:
        frequencies: F, features x inputs, drawn by torch's generator; a buffer, not learned.

    Raises:
        ConfigurationError: a number that is no whole one of at least 1, or a frequency ≤ 0.

    Example:
        >>> encode = FourierFeatures(2, 16, frequency=4.0)
        >>> places = torch.rand(5, 2)
        >>> encode(places).shape, encode(places).square().sum(1)  # sin² + cos² = 1
        (torch.Size([5, 32]), tensor([16., 16., 16., 16., 16.]))
    """

    frequencies: Tensor

    def __init__(self, inputs: int, features: int, frequency: float) -> None:
        super().__init__()
        for name, size in (("inputs", inputs), ("features", features)):
            if not isinstance(size, int) or size < 1:
                raise ConfigurationError(f"{name} must be at least 1, a whole number, got {size!r}")
        if not 0 < frequency < math.inf:
            raise ConfigurationError(f"frequency must be positive, got {frequency}")
        self.register_buffer("frequencies", frequency * torch.randn(features, inputs))

    def forward(self, places: Tensor) -> Tensor:
        """The features of places, ... x inputs."""
        angles = torch.pi * (places @ self.frequencies.T)
        return torch.cat([angles.sin(), angles.cos()], -1)
