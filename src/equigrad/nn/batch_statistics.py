"""Batch normalisation that remembers nothing."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm


class BatchStatistics(nn.Module):
    r"""Batch normalisation by the statistics of what it is handed, in either mode.

        y = g (x - μ) / √(σ² + ε) + b        (Ioffe and Szegedy 2015)

    with the mean and variance of every channel over the whole batch, or over its first `reference`
    rows. A network with these has no buffers, and a loss is a function of its parameters alone.
    Over the whole batch, what it says of an image depends on the images beside it (it is
    transductive); with the support set first and `reference` its size, on those alone.

    Args:
        norm: the layer to take the place of; its gain and shift are taken over.

    Attributes:
        reference: how many rows the statistics are of; None for all.

    Example:
        >>> layer = BatchStatistics(nn.BatchNorm1d(3))
        >>> layer(torch.randn(8, 3)).mean().abs() < 1e-6
        tensor(True)
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.reference: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a batch of shape n × channels × …."""
        return self.normalise(x, self.weight, self.bias)

    def normalise(self, x: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        """The same with another gain and shift."""
        if self.reference is None:
            return batch_norm(x, None, None, gain, shift, training=True, eps=self.eps)
        each = [0, *range(2, x.ndim)]
        variance, mean = torch.var_mean(x[: self.reference], each, correction=0, keepdim=True)
        scaled = (x - mean) * torch.rsqrt(variance + self.eps)
        shape = [1, -1] + [1] * (x.ndim - 2)
        if gain is not None:
            scaled = scaled * gain.reshape(shape)
        return scaled if shift is None else scaled + shift.reshape(shape)


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """A copy of a module whose batch normalisation remembers nothing."""
    known: dict[nn.Module, nn.Module] = {}  # a layer may stand in two places

    def swapped(part: nn.Module) -> nn.Module:
        if part not in known:
            known[part] = BatchStatistics(part) if isinstance(part, _BatchNorm) else part
            for name, child in known[part]._modules.items():
                if child is not None:
                    known[part]._modules[name] = swapped(child)
        return known[part]

    return swapped(copy.deepcopy(model))


def with_statistics_of(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy of a module in `eval` mode, with the statistics of a batch in its normalisation."""
    module = copy.deepcopy(model).eval()

    def remember(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (batch,) = inputs
        each = [0, *range(2, batch.ndim)]
        norm.running_var, norm.running_mean = torch.var_mean(batch, each, correction=0)

    hooks = []
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.track_running_stats = True
            hooks.append(part.register_forward_pre_hook(remember))
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()
    return module
