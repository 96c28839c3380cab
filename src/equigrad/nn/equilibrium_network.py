"""A network whose state rests under its input, with a readout that settles with it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from equigrad.errors import ConfigurationError, ProblemError
from equigrad.fields import expect
from equigrad.nn.batches import draws, first_line, reading, summed_cross_entropy
from equigrad.nn.parts import Parts
from equigrad.nn.relaxing import OuterLoss
from equigrad.problems import FixedPoint, Params


class EquilibriumNetwork(nn.Module):
    r"""A network that is shown one input until it rests: a deep equilibrium model as a problem.

        h = f(h, e(x)),    y = r(h)

    h has a readout y, which settles with it, so that a controller acts on outputs and neurons
    alike, and every weight acts on what settles. Where the loss need not be known before the
    backward pass, `EquilibriumLayer` puts the same cell inside any network.

    Args:
        input: e, any module; what it makes of x has the shape of h.
        recurrent: f, called as `recurrent(h, e(x))`; returns h in its shape. It should contract.
        readout: r, whose output is y.
        outer_loss: of y and the targets, summed over samples.

    Raises:
        ConfigurationError: a part that is no module, or has buffers (batch normalisation makes
            samples depend on each other).

    Example:
        >>> import torch, equigrad as eg
        >>> read = nn.Sequential(nn.Flatten(), nn.Linear(8 * 4 * 4, 5))
        >>> net = EquilibriumNetwork(nn.Conv2d(3, 8, 3), eg.nn.ResidualCell(8, groups=2), read)
        >>> x, y = torch.randn(2, 3, 6, 6), torch.tensor([1, 4])
        >>> result = eg.meta_gradient(
        ...     net.problem(x, y), net.start(x), dict(net.named_parameters()),
        ...     solver=eg.Anderson(tol=1e-3), estimator=eg.Adjoint(),
        ... )
        >>> net.logits(result.params, {}).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        input: nn.Module,
        recurrent: nn.Module,
        readout: nn.Module,
        *,
        outer_loss: OuterLoss = summed_cross_entropy,
    ) -> None:
        super().__init__()
        expect(nn.Module, input=input, recurrent=recurrent, readout=readout)
        for name, part in (("input", input), ("recurrent", recurrent), ("readout", readout)):
            if any(True for _ in part.buffers()):
                raise ConfigurationError(
                    f"{name} has buffers, as batch normalisation has, whose samples depend on each "
                    f"other; take nn.GroupNorm or nn.LayerNorm, or leave it out"
                )
        self.input, self.recurrent, self.readout = input, recurrent, readout
        self.outer_loss = outer_loss
        self._parts = Parts(self, ["input", "recurrent", "readout"])
        self._fits: torch.Size | None = None

    @torch.no_grad()
    def start(self, x: Tensor) -> dict[str, Tensor]:
        """All neurons silent.

        Raises:
            ProblemError: the network cannot read such inputs, or its cell does not turn a state
                and what is made of them into a state again.
        """
        with reading(self, x):
            h = self.input(x[:1])
            y = self.readout(h)
        if h.shape[1:] != self._fits:
            self._check_cell(h)
        return {name: x.new_zeros(len(x), *part.shape[1:]) for name, part in (("h", h), ("y", y))}

    def _check_cell(self, h: Tensor) -> None:
        """Try the cell on one sample, and remember that it fits such samples."""
        try:
            with torch.random.fork_rng():
                shape = self.recurrent(torch.zeros_like(h), h).shape
        except (TypeError, AttributeError, ValueError, RuntimeError, IndexError) as error:
            raise ProblemError(
                f"recurrent is called as recurrent(h, e(x)), both in the shape of what input makes "
                f"of x, {tuple(h.shape[1:])} a sample: {first_line(error)}"
            ) from error
        if shape != h.shape:
            raise ProblemError(
                f"recurrent must return h in its shape, {tuple(h.shape[1:])} a sample, got "
                f"{tuple(shape[1:])}"
            )
        self._fits = h.shape[1:]

    def problem(self, x: Tensor, y: Tensor) -> FixedPoint:
        """The network on a batch, judged by its targets."""
        return FixedPoint(
            _Map(self, x),
            lambda params, meta: self.outer_loss(params["y"], y),
            modules=(),
            reaches={"inner": [name for name, _ in self.named_parameters()], "outer": []},
            samples=True,
        )

    def logits(self, params: Params, meta_params: Params) -> Tensor:
        """The readout."""
        return params["y"]

    def bind(self, part: str, meta_params: Params) -> Callable[..., Tensor]:
        """`input`, `recurrent` or `readout` with the weights that `meta_params` holds."""
        return self._parts.bind(self, part, meta_params)


class _Map:
    """The map of a network on a batch."""

    def __init__(self, net: EquilibriumNetwork, x: Tensor) -> None:
        self._net, self._x = net, x

    def __call__(self, params: Params, meta_params: Params) -> Mapping[str, Tensor]:
        return self.at(meta_params)(params)

    def at(self, meta_params: Params) -> Callable[[Params], Mapping[str, Tensor]]:
        """What is made of the input is computed once, unless it draws random numbers."""
        parts = ("input", "recurrent", "readout")
        encode, relax, read = (self._net.bind(part, meta_params) for part in parts)
        once = None if draws(self._net.input) else encode(self._x)

        def step(params: Params) -> dict[str, Tensor]:
            drive = encode(self._x) if once is None else once
            return {"h": relax(params["h"], drive), "y": read(params["h"])}

        return step
