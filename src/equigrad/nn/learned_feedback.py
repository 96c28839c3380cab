"""Layers whose backward pass uses learned weights of its own (Kolen-Pollack)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import conv2d, linear
from torch.nn.grad import conv2d_input, conv2d_weight

from equigrad.errors import ConfigurationError
from equigrad.nn.copies import copied


class LearnedFeedback(nn.Module):
    r"""A linear or convolutional layer whose backward pass uses separate, learned weights.

        y = W x + b,    x̄ = Bᵀ ȳ,    W̄ = B̄ = ȳ xᵀ,    b̄ = ȳ

    where a bar marks the gradient with respect to a quantity. Forward weights W and feedback
    weights B receive the same gradient. With the same weight decay, their difference vanishes,
    `W - B ∝ (1 - decay)^t`: the backward path becomes the transpose of the forward path without
    weight transport (Kolen, Pollack 1994; Akrout et al. 2019). Under `DynamicInversion` this is
    the Kolen–Pollack controller.

    Args:
        layer: an `nn.Linear`, or an `nn.Conv2d` with zero padding; its weight and bias are taken
            over.

    Attributes:
        weight: W.
        bias: b, or None.
        feedback: B, of the shape of W; drawn by the layer's own initialisation.

    Raises:
        ConfigurationError: the layer is of another class, also a subclass, or its weight is
            computed from other parameters.

    Example:
        >>> layer = LearnedFeedback(nn.Linear(3, 2))
        >>> x = torch.ones(1, 3, requires_grad=True)
        >>> layer(x).sum().backward()
        >>> torch.equal(x.grad[0], layer.feedback.sum(0))
        True
        >>> torch.equal(layer.weight.grad, layer.feedback.grad)
        True
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        usual = type(layer) is nn.Conv2d and (
            layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        )
        plain = (usual or type(layer) is nn.Linear) and "weight" in layer._parameters
        if not plain:
            raise ConfigurationError(
                f"learned feedback supports nn.Linear, and nn.Conv2d with numeric zero padding, "
                f"but not their subclasses or computed weights (weight normalisation); got "
                f"{layer} of type {type(layer).__name__}"
            )
        self.weight, self.bias = layer.weight, layer.bias
        twin = copied(layer)
        twin.reset_parameters()
        self.feedback = nn.Parameter(twin.weight.detach())
        self._convolution: tuple[Any, ...] | None = None
        if isinstance(layer, nn.Conv2d):
            self._convolution = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        """`W x + b`."""
        return _Asymmetric.apply(x, self.weight, self.bias, self.feedback, self._convolution)  # pyright: ignore

    @torch.no_grad()
    def alignment(self) -> float:
        """The angle between W and B, in degrees."""
        w, b = self.weight.flatten(), self.feedback.flatten()
        return torch.rad2deg(torch.acos((w @ b / (w.norm() * b.norm())).clamp(-1, 1))).item()


class _Asymmetric(Function):
    """A product with one matrix in the forward pass and another in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        feedback: Tensor,
        convolution: tuple[Any, ...] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, feedback)
        ctx.convolution = convolution
        return (
            linear(x, weight, bias)
            if convolution is None
            else conv2d(x, weight, bias, *convolution)
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        x, feedback = ctx.saved_tensors
        given = x.dtype
        x, gradient = x.to(feedback.dtype), gradient.to(feedback.dtype)  # autocast lowers them
        by_input, by_weight, by_bias, by_feedback, _ = ctx.needs_input_grad
        x_bar = w_bar = b_bar = None
        if ctx.convolution is None:
            rows = gradient.reshape(-1, gradient.shape[-1])
            if by_input:
                x_bar = gradient @ feedback
            if by_weight or by_feedback:
                w_bar = rows.T @ x.reshape(-1, x.shape[-1])
            if by_bias:
                b_bar = rows.sum(0)
        else:
            if by_input:
                x_bar = conv2d_input(x.shape, feedback, gradient, *ctx.convolution)
            if by_weight or by_feedback:
                w_bar = conv2d_weight(x, feedback.shape, gradient, *ctx.convolution)
            if by_bias:
                b_bar = gradient.sum((0, 2, 3))
        x_bar = None if x_bar is None else x_bar.to(given)
        return x_bar, w_bar, b_bar, None if w_bar is None else w_bar.clone(), None


def with_learned_feedback(model: nn.Module) -> nn.Module:
    """A copy of a module whose linear and convolutional layers have learned feedback.

    Other layers are kept.

    Raises:
        ConfigurationError: a linear or convolutional layer that `LearnedFeedback` does not take,
            such as the one in `nn.MultiheadAttention`.

    Example:
        >>> net = with_learned_feedback(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        >>> sorted(dict(net.named_parameters()))[:3]
        ['0.bias', '0.feedback', '0.weight']
    """
    known: dict[nn.Module, nn.Module] = {}  # a layer may occur twice

    def swapped(part: nn.Module) -> nn.Module:
        if part not in known:
            layer = isinstance(part, nn.Linear | nn.Conv2d)
            known[part] = LearnedFeedback(part) if layer else part
            for name, child in part._modules.items():
                if child is not None and not layer:
                    part._modules[name] = swapped(child)
        return known[part]

    return swapped(copied(model))
