"""A recurrent network that settles under a constant input, with a readout that settles with it."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from equigrad.fields import Count, NotNegative, expect
from equigrad.nn.batches import summed_cross_entropy
from equigrad.nn.equilibrium_network import EquilibriumNetwork
from equigrad.nn.relaxing import OuterLoss


class EquilibriumRNN(EquilibriumNetwork):
    r"""A recurrent network that settles under a constant input.

        h = tanh(W h + U x + b),    y = V h + c

    The readout y settles together with h, so that a controller can act on outputs as on neurons.
    W is initialised with a spectral norm of about `recurrence`, as a contraction.

    Args:
        inputs: size of x; an input of more dimensions is flattened.
        hidden: number of neurons.
        outputs: size of y.
        outer_loss: loss of y and the targets, summed over samples.
        recurrence: approximate spectral norm of the initial W.

    Raises:
        ConfigurationError: a size is not a whole number of at least 1, or recurrence is negative.

    Example:
        >>> import torch, equigrad as eg
        >>> net = EquilibriumRNN(4, 16, 3)
        >>> x, y = torch.randn(5, 4), torch.arange(5) % 3
        >>> result = eg.meta_gradient(
        ...     net.problem(x, y), net.start(x), dict(net.named_parameters()),
        ...     solver=eg.Anderson(tol=1e-5), estimator=eg.LeastControl(),
        ... )
        >>> net.logits(result.params, {}).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        *,
        outer_loss: OuterLoss = summed_cross_entropy,
        recurrence: float = 0.5,
    ) -> None:
        expect(Count, inputs=inputs, hidden=hidden, outputs=outputs)
        expect(NotNegative, recurrence=recurrence)
        parts = _Flat(inputs, hidden), _Tanh(hidden, hidden, bias=False), nn.Linear(hidden, outputs)
        # n × n independent normal entries have a spectral norm of about 2√n standard deviations
        nn.init.normal_(parts[1].weight, std=recurrence / (2 * hidden**0.5))
        super().__init__(*parts, outer_loss=outer_loss)


class _Flat(nn.Linear):
    """`U x + b`, with inputs of any shape flattened."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore
        return linear(x.flatten(1), self.weight, self.bias)


class _Tanh(nn.Linear):
    """`tanh(W h + z)`."""

    def forward(self, h: Tensor, z: Tensor) -> Tensor:  # pyright: ignore
        return torch.tanh(z + linear(h, self.weight))
