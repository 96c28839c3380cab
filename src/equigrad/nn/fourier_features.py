"""Fourier features: sines and cosines of coordinates as the input of a network."""

import torch
from torch import Tensor, nn

from equigrad.fields import Count, Positive, expect


class FourierFeatures(nn.Module):
    r"""Sines and cosines of coordinates, with random frequencies (Tancik et al. 2020).

        γ(x) = [sin πFx, cos πFx],    F_ij ~ N(0, frequency²)

    A network that sees raw coordinates learns little but slow variations. With these features it
    learns faster ones, the faster the larger `frequency` is. An axis from -1 to 1 holds as many
    cycles as its frequency.

    Args:
        inputs: number of coordinates.
        features: number of frequencies; there are twice as many outputs.
        frequency: standard deviation of the frequencies.

    Attributes:
        frequencies: F, features x inputs, drawn by torch's generator; a buffer, not learned.

    Raises:
        ConfigurationError: inputs or features is not a whole number ≥ 1, or frequency is ≤ 0.

    Example:
        >>> encode = FourierFeatures(2, 16, frequency=4.0)
        >>> places = torch.rand(5, 2)
        >>> encode(places).shape, encode(places).square().sum(1)  # sin² + cos² = 1
        (torch.Size([5, 32]), tensor([16., 16., 16., 16., 16.]))
    """

    frequencies: Tensor

    def __init__(self, inputs: int, features: int, frequency: float) -> None:
        super().__init__()
        expect(Count, inputs=inputs, features=features)
        expect(Positive, frequency=frequency)
        self.register_buffer("frequencies", frequency * torch.randn(features, inputs))

    def forward(self, places: Tensor) -> Tensor:
        """The features of coordinates, ... x inputs."""
        angles = torch.pi * (places @ self.frequencies.T)
        return torch.cat([angles.sin(), angles.cos()], -1)
