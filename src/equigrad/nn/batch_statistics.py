"""Batch normalisation by the statistics of a given batch, without running statistics."""

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from equigrad.nn.copies import copied


class BatchStatistics(nn.Module):
    r"""Batch normalisation by the statistics of its own input, in training and in `eval` mode.

        y = g (x - μ) / √(σ² + ε) + b        (Ioffe and Szegedy 2015)

    with the mean and variance of every channel over the whole batch, or over its first `reference`
    rows. A network with such layers has no buffers, and its loss is a function of its parameters
    alone. Over the whole batch, the output for an image depends on the other images of the batch
    (it is transductive). With the support set in the first `reference` rows, it depends on the
    support set alone.

    Args:
        norm: the layer to replace; its gain and shift are taken over.

    Attributes:
        reference: number of rows that the statistics are taken over; None for all.
        constant: whether derivatives treat the statistics of the reference as constants.
        twice: whether derivatives will be differentiated again.

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
        self.constant = self.twice = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a batch of shape n × channels × …."""
        return self.normalise(x, self.weight, self.bias)

    def normalise(
        self,
        x: Tensor,
        gain: Tensor | None,
        shift: Tensor | None,
        *,
        channels_last: bool = False,
    ) -> Tensor:
        """Normalise a batch with another gain and shift.

        On a CPU torch's kernel for images with channels last adds them up in their order, with 3 to
        20 times the rounding of other layouts. If it is differentiated twice, it is also slower
        than the formula, which is then used. Statistics are in float32 at least, also of a batch
        that autocast has lowered; the kernel computes them in the precision of the gain.

        Args:
            x: the batch.
            gain: one factor for each channel.
            shift: one summand for each channel.
            channels_last: whether this is the layout of the batch.
        """
        kernel = self.reference is None and not (self.twice and channels_last)
        if gain is None or not kernel:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        if kernel:
            return batch_norm(x, None, None, gain, shift, training=True, eps=self.eps)
        each = [0, *range(2, x.ndim)]
        known = x[: self.reference].detach() if self.constant else x[: self.reference]
        variance, mean = torch.var_mean(known, each, correction=0, keepdim=True)
        scale = torch.rsqrt(variance + self.eps)
        shape = [1, -1] + [1] * (x.ndim - 2)
        if gain is not None:
            scale = scale * gain.reshape(shape)
        scaled = (x - mean) * scale
        return scaled if shift is None else scaled + shift.reshape(shape)


class ReferenceStatistics(nn.Module):
    """A module whose batch normalisation takes the statistics of a reference batch.

    The output for an image depends on that image, the reference (the training set, for example)
    and the parameters, and on nothing else; derivatives go through the statistics. Each call also
    computes the outputs of the reference, unless the reference is its input.

    With `constant`, derivatives of the output for any other input hold the statistics fixed. A
    network in `eval` mode does the same with its running statistics. These too depend on the
    parameters, and such derivatives leave this dependence out.

    Args:
        model: any module whose inputs have one row a sample. It is copied, never changed.
        reference: a batch of inputs for the module.
        constant: whether derivatives hold the statistics fixed.

    Example:
        >>> net = ReferenceStatistics(nn.BatchNorm1d(3), torch.randn(8, 3))
        >>> x = torch.randn(4, 3)
        >>> torch.allclose(net(x)[:1], net(x[:1]))
        True
    """

    reference: Tensor

    def __init__(self, model: nn.Module, reference: Tensor, *, constant: bool = False) -> None:
        super().__init__()
        self.model = with_batch_statistics(model)
        self._norms = [m for m in self.model.modules() if isinstance(m, BatchStatistics)]
        for norm in self._norms:
            norm.constant = constant
        self.register_buffer("reference", reference, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The module's outputs for x."""
        itself = x.shape == self.reference.shape and torch.equal(x, self.reference)
        size = len(self.reference)
        for norm in self._norms:
            norm.reference = None if itself else size
        if itself:
            return self.model(x)
        return self.model(torch.cat([self.reference, x]))[size:]


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """A copy of a module whose batch normalisation keeps no running statistics."""
    known: dict[nn.Module, nn.Module] = {}  # a layer may occur twice

    def swapped(part: nn.Module) -> nn.Module:
        if part not in known:
            known[part] = BatchStatistics(part) if isinstance(part, _BatchNorm) else part
            for name, child in known[part]._modules.items():
                if child is not None:
                    known[part]._modules[name] = swapped(child)
        return known[part]

    return swapped(copied(model))


def with_statistics_of(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy of a module in `eval` mode whose normalisation uses the statistics of a batch."""
    module = copied(model).eval()

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
