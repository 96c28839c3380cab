"""A recurrent network at rest, with a readout that settles with it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from equigrad.errors import ConfigurationError
from equigrad.nn.batches import reading, summed_cross_entropy
from equigrad.nn.relaxing import OuterLoss
from equigrad.problems import FixedPoint, Params


class EquilibriumRNN(nn.Module):
    r"""A recurrent network that is shown one input until it rests.

        h = tanh(W h + U x + b),    y = V h + c

    h has a readout y, which settles with it, so that a controller acts on outputs and neurons
    alike. W starts as a contraction, of spectral norm about `recurrence`.

    Args:
        inputs: size of x; an input of more dimensions is flattened.
        hidden: number of neurons.
        outputs: size of y.
        outer_loss: of y and the targets, summed over samples.
        recurrence: about the spectral norm of W at the start.

    Raises:
        ConfigurationError: a size that is no whole number of at least 1, or a recurrence below 0.

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
        super().__init__()
        for name, size in (("inputs", inputs), ("hidden", hidden), ("outputs", outputs)):
            if not isinstance(size, int) or size < 1:
                raise ConfigurationError(f"{name} must be at least 1, a whole number, got {size!r}")
        if not 0 <= recurrence < float("inf"):
            raise ConfigurationError(f"recurrence must be at least 0, got {recurrence}")
        self.input = nn.Linear(inputs, hidden)
        self.recurrent = nn.Linear(hidden, hidden, bias=False)
        self.readout = nn.Linear(hidden, outputs)
        # a matrix of independent normal entries has a spectral norm of about 2√n their deviation
        nn.init.normal_(self.recurrent.weight, std=recurrence / (2 * hidden**0.5))
        self.outer_loss = outer_loss

    @torch.no_grad()
    def start(self, x: Tensor) -> dict[str, Tensor]:
        """All neurons silent.

        Raises:
            ProblemError: the network cannot read such inputs.
        """
        with reading(self, x):
            self.input(x.flatten(1)[:1])
        weight = self.readout.weight
        sizes = {"h": weight.shape[1], "y": weight.shape[0]}
        return {name: x.new_zeros(len(x), size) for name, size in sizes.items()}

    def problem(self, x: Tensor, y: Tensor) -> FixedPoint:
        """The network on a batch, judged by its targets."""
        return FixedPoint(
            _Cell(x.flatten(1)),
            lambda params, meta: self.outer_loss(params["y"], y),
            modules=(),
            reaches={"inner": [name for name, _ in self.named_parameters()], "outer": []},
            samples=True,
        )

    def logits(self, params: Params, meta_params: Params) -> Tensor:
        """The readout."""
        return params["y"]


class _Cell:
    """The map of a network on a batch."""

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def __call__(self, params: Params, meta_params: Params) -> Mapping[str, Tensor]:
        return self.at(meta_params)(params)

    def at(self, meta_params: Params) -> Callable[[Params], Mapping[str, Tensor]]:
        """The drive by the input is computed once."""
        drive = linear(self._x, meta_params["input.weight"], meta_params["input.bias"])
        recurrent, readout = meta_params["recurrent.weight"], meta_params["readout.weight"]
        bias = meta_params["readout.bias"]

        def relax(params: Params) -> dict[str, Tensor]:
            h = params["h"]
            return {"h": torch.tanh(drive + linear(h, recurrent)), "y": linear(h, readout, bias)}

        return relax
