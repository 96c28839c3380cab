"""Steps of logarithms that are in proportion to the gradient."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class ProportionalDescent(torch.optim.Optimizer):
    r"""Gradient descent whose step has a root mean square of `lr`, whatever the gradient's size.

        θ ← θ - lr g / rms(g),    no component by more than 1.

    For logarithms of strengths: what matters most changes most, by a factor of e at most, and what
    hardly matters stays. Adam, which scales each component by itself, moves them all alike.

    Args:
        params: θ.
        lr: root mean square of a step.

    Example:
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> theta.grad = torch.tensor([3.0, 4.0])
        >>> ProportionalDescent([theta], lr=0.1).step()
        >>> theta.detach()
        tensor([-0.0849, -0.1131])
    """

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take tensors to step; torch's own would import its compiler, which takes seconds."""
        self.param_groups.append(
            {**self.defaults, **param_group, "params": list(param_group["params"])}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move; nothing moves where the gradient is zero."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            squares = torch.cat([p.grad.flatten() for p in moved]).square().mean()
            for p in moved:
                p.sub_((group["lr"] * p.grad / squares.sqrt()).nan_to_num(0.0).clamp(-1, 1))
