"""A committee: several networks whose outputs are averaged."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from equigrad.nn.networks import tanh_network


class Committee(nn.Module):
    """The mean of the outputs of several networks.

    Args:
        members: the networks, with the same inputs and outputs.

    Example:
        >>> committee = Committee([nn.Linear(2, 1), nn.Linear(2, 1)])
        >>> committee(torch.ones(3, 2)).shape
        torch.Size([3, 1])
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of shape n × ….."""
        return torch.stack([member(x) for member in self.members]).mean(0)


def tanh_committee(inputs: int, hidden: Sequence[int], outputs: int, members: int) -> Committee:
    """A committee of `tanh_network`s."""
    return Committee([tanh_network(inputs, hidden, outputs) for _ in range(members)])


def named_by_member(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename stacked parameters, of shape members × …, to the names of a committee's parameters."""
    return {f"members.{k}.{n}": each for n, p in params.items() for k, each in enumerate(p)}
