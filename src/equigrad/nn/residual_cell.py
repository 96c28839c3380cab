"""A convolutional residual block as the cell of an equilibrium model."""

from torch import Tensor, nn

from equigrad.fields import Count, NotNegative, expect, require


class ResidualCell(nn.Module):
    r"""A residual block with input injection, for `EquilibriumLayer` or `EquilibriumNetwork`.

        h ← norm(relu(h + norm(z + conv(norm(relu(conv h))))))

    with 3 × 3 convolutions and group normalisation (Wu, He 2018), which does not mix samples. The
    initial weights are small, so that the cell contracts.

    Args:
        channels: channels of h and z.
        groups: groups of each normalisation; they divide the channels.
        deviation: standard deviation of the normally distributed initial weights.

    Raises:
        ConfigurationError: channels or groups < 1, groups that do not divide the channels, or a
            deviation < 0.

    Example:
        >>> import torch
        >>> h = torch.randn(2, 16, 8, 8)
        >>> ResidualCell(16)(h, h).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(self, channels: int, *, groups: int = 8, deviation: float = 0.01) -> None:
        super().__init__()
        expect(Count, channels=channels, groups=groups)
        expect(NotNegative, deviation=deviation)
        require(
            channels % groups == 0,
            f"channels must be a multiple of the {groups} groups of its group normalisation, got "
            f"{channels}",
        )
        self.one = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.two = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in range(3))
        for conv in (self.one, self.two):
            nn.init.normal_(conv.weight, std=deviation)

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        """One step of the map."""
        inner = self.norms[0](self.one(h).relu())
        return self.norms[2]((h + self.norms[1](z + self.two(inner))).relu())
