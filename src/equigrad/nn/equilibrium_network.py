"""A deep equilibrium model: an input module, a cell, and a readout that settles with the state."""

import torch
from torch import Tensor, nn

from equigrad.errors import ProblemError
from equigrad.fields import expect
from equigrad.nn.batches import draws, first_line, reading, summed_cross_entropy
from equigrad.nn.relaxing import Map, OuterLoss, SettlingByMap, refuse_buffers
from equigrad.problems import Params


class EquilibriumNetwork(SettlingByMap):
    r"""A deep equilibrium model as a problem: a network that settles under a constant input.

        h = f(h, e(x)),    y = r(h)

    The readout y settles together with h, so that a controller can act on outputs as on neurons,
    and every weight is part of the fixed-point map. `EquilibriumLayer` puts the same cell inside
    any network, and does not need to know the loss before the backward pass.

    Args:
        input: e, any module; its output e(x) has the shape of h.
        recurrent: f, called as `recurrent(h, e(x))`; returns h in its shape. It should contract.
        readout: r, whose output is y.
        outer_loss: loss of y and the targets, summed over samples.

    Raises:
        ConfigurationError: a part is not a module, or has buffers (batch normalisation makes
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
        super().__init__(outer_loss)
        expect(nn.Module, input=input, recurrent=recurrent, readout=readout)
        for name, part in (("input", input), ("recurrent", recurrent), ("readout", readout)):
            refuse_buffers(name, part)
        self.input, self.recurrent, self.readout = input, recurrent, readout
        self._settles({name: name for name in ("input", "recurrent", "readout")}, output="y")
        self._fits: torch.Size | None = None

    @torch.no_grad()
    def start(self, x: Tensor) -> dict[str, Tensor]:
        """The initial state: zeros.

        Raises:
            ProblemError: the network cannot read such inputs, or its cell does not return a state
                of the shape that it was given.
        """
        with reading(self, x):
            h = self.input(x[:1])
            y = self.readout(h)
        if h.shape[1:] != self._fits:
            self._check_cell(h)
        return {name: x.new_zeros(len(x), *part.shape[1:]) for name, part in (("h", h), ("y", y))}

    def _check_cell(self, h: Tensor) -> None:
        """Try the cell on one sample, once for every shape of sample."""
        try:
            with torch.random.fork_rng():
                shape = self.recurrent(torch.zeros_like(h), h).shape
        except (TypeError, AttributeError, ValueError, RuntimeError, IndexError) as error:
            raise ProblemError(
                f"recurrent is called as recurrent(h, e(x)), where both have the shape that input "
                f"returns, {tuple(h.shape[1:])} for each sample, and it failed: "
                f"{first_line(error)}"
            ) from error
        if shape != h.shape:
            raise ProblemError(
                f"recurrent must return h with its shape, {tuple(h.shape[1:])} for each sample, "
                f"got {tuple(shape[1:])}"
            )
        self._fits = h.shape[1:]

    def map_on(self, x: Tensor, meta_params: Params) -> Map:
        """The map of the states. e(x) is computed once, unless it draws random numbers."""
        encode, relax, read = (self.bind(part, meta_params) for part in self._paths)
        once = None if draws(self.input) else encode(x)

        def step(params: Params) -> dict[str, Tensor]:
            drive = encode(x) if once is None else once
            return {"h": relax(params["h"], drive), "y": read(params["h"])}

        return step
