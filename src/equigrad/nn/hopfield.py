"""Layered Hopfield networks."""

import copy
import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from equigrad.errors import ConfigurationError
from equigrad.fields import Count, expect, require
from equigrad.nn.batches import draws, labelling, reading, summed_cross_entropy
from equigrad.nn.functional import Functional
from equigrad.nn.hebbian import coactivity
from equigrad.problems import EnergyBased, Params
from equigrad.randomness import Stream

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hard sigmoid": lambda drive: drive.clamp(0, 1),
    "sigmoid": lambda drive: torch.sigmoid(4 * drive - 2),
    "tanh": torch.tanh,
    "identity": lambda drive: drive,
}
"""Activation functions by name."""


class Hopfield(nn.Module):
    r"""A layered Hopfield network with a clamped input.

        Φ(s, θ) = Σ_l ⟨s_l, c_l(s_{l-1})⟩,    s_0 = x
        s_l = ρ(c_l(s_{l-1}) + (∂c_{l+1}/∂s_l)ᵀ s_{l+1})

    for connections `c_l` from one layer to the next: any modules, usually `W s + b` (Hopfield
    1984; Scellier, Bengio 2017), or a convolution with a pooling (Laborieux et al. 2021). Feedback
    uses the transposes of the same weights, so that the network has an energy,
    `E = Σ_i G(s_i) - Φ` with `G' = ρ⁻¹`, and equilibrium propagation gives its gradient.
    `eg.meta_gradient(net.problem(x, y), net.start(x), dict(net.named_parameters()), …)` returns
    the gradient of the loss summed over samples.

    There are two readouts. *squared error*: the last layer of neurons is the output, with the loss
    `½‖s_L - y‖²`, where y is one for the class and zero elsewhere; the nudge acts on these neurons.
    *cross-entropy*: the last connection reads the last layer of neurons without feedback to it; its
    outputs are the logits of the loss and no neurons. Its gradient is the direct term alone.

    Connections keep their initial weights. PyTorch's default, uniform in `±1/√fan_in`, is that of
    Laborieux et al. and of every setting in docs/energy-based-networks.md; it is small enough for
    layers that drive each other to settle.

    Args:
        connections: modules from the input to the first layer of neurons, and from each layer to
            the next. Their outputs may have any shape, samples first, without mixing samples.
        activation: ρ of hidden neurons, elementwise and nowhere decreasing: `hard sigmoid`
            (between 0 and 1), `sigmoid` (its smooth version `1/(1 + e^{2-4d})`), `tanh`, or any
            function. The holomorphic scheme needs a smooth one.
        output: ρ of the output neurons under squared error. The identity always responds to the
            nudge; a saturated hard sigmoid does not.
        readout: `squared error` or `cross-entropy`.

    Raises:
        ConfigurationError: there are too few connections, one has buffers (batch normalisation
            makes samples depend on each other), or an argument is invalid.

    Example:
        >>> import torch, equigrad as eg
        >>> net = eg.nn.Hopfield.fully_connected([4, 8, 3], readout="cross-entropy")
        >>> x, y = torch.randn(5, 4), torch.arange(5) % 3
        >>> result = eg.meta_gradient(
        ...     net.problem(x, y),
        ...     net.start(x),
        ...     dict(net.named_parameters()),
        ...     solver=eg.Picard(tol=1e-5),
        ...     estimator=eg.Contrastive(beta=0.1, scheme="symmetric"),
        ... )
        >>> result.grads["connections.0.weight"].shape
        torch.Size([8, 4])
    """

    def __init__(
        self,
        connections: Sequence[nn.Module],
        *,
        activation: str | Callable[[Tensor], Tensor] = "hard sigmoid",
        output: str | Callable[[Tensor], Tensor] = "identity",
        readout: Literal["squared error", "cross-entropy"] = "squared error",
    ) -> None:
        super().__init__()
        expect(Literal["squared error", "cross-entropy"], readout=readout)
        least = 1 if readout == "squared error" else 2
        if len(connections) < least:
            raise ConfigurationError(
                f"a {readout} readout needs at least {least} connections, got {len(connections)}, "
                f"which leaves no neurons to settle"
            )
        for i, connection in enumerate(connections):
            if not isinstance(connection, nn.Module):
                raise ConfigurationError(
                    f"connection {i} must be a torch.nn.Module, got {connection!r}"
                )
            if any(True for _ in connection.buffers()):
                raise ConfigurationError(
                    f"connection {i} has buffers, as batch normalisation does, which makes "
                    f"samples depend on each other; leave it out"
                )
        self.connections = nn.ModuleList(connections)
        self.readout = readout
        count = len(connections) - (readout == "cross-entropy")
        self.neurons = [f"layer{i + 1}" for i in range(count)]
        self.activations = dict.fromkeys(self.neurons, _activation("activation", activation))
        if readout == "squared error":
            self.activations[self.neurons[-1]] = _activation("output", output)
        self._functional: Functional | None = None
        self._made_of: list[object] = []

    @classmethod
    def fully_connected(cls, sizes: Sequence[int], **options: Any) -> Self:
        """A network whose connections are linear layers.

        Args:
            sizes: sizes of the input, the hidden layers and the output.
            options: further arguments of `Hopfield`.

        Raises:
            ConfigurationError: a size < 1, or no layer at all.
        """
        expect(tuple[Count, ...], sizes=sizes)
        require(len(sizes) > 1, f"sizes must have at least two entries, got {sizes}")
        return cls([nn.Linear(wide, narrow) for wide, narrow in pairwise(sizes)], **options)

    @property
    def reaches(self) -> dict[Stream, list[str]]:
        """Names of the parameters of Φ and of the outer loss; tied parameters are in both."""
        last = f"connections.{len(self.neurons)}."
        reached: dict[Stream, dict[str, None]] = {"inner": {}, "outer": {}}
        for place, name in self._names().items():
            reached["outer" if place.startswith(last) else "inner"][name] = None
        return {stream: list(names) for stream, names in reached.items()}

    def _names(self) -> dict[str, str]:
        """The parameter's name at every place; a tied parameter has the name of its first place."""
        first: dict[int, str] = {}
        return {
            place: first.setdefault(id(p), place)
            for place, p in self.named_parameters(remove_duplicate=False)
        }

    @torch.no_grad()
    def start(self, x: Tensor) -> dict[str, Tensor]:
        """Initial activities: each layer driven by the layers before it alone.

        Args:
            x: inputs, samples first.

        Raises:
            ProblemError: the connections cannot read such inputs.
        """
        states: dict[str, Tensor] = {}
        with reading(self, x):
            for name, connection in zip(self.neurons, self.connections, strict=False):
                x = states[name] = self.activations[name](connection(x))
        return states

    def problem(self, x: Tensor, y: Tensor) -> EnergyBased:
        """The network with its input clamped, and the loss summed over samples as outer loss.

        Args:
            x: inputs, samples first.
            y: class of each sample, as a whole number; or, under squared error, targets in the
                shape of the output neurons.
        """
        self._follow()
        return EnergyBased(
            _Energy(self, x),
            self._loss(y),
            activation=self.activations,
            modules=(),
            reaches=self.reaches,
            samples=True,
        )

    def logits(self, params: Params, meta_params: Params) -> Tensor:
        """The network's output: the output neurons, or the readout of the last layer.

        Args:
            params: the settled neurons.
            meta_params: the network's parameters.
        """
        self._follow()
        return self._said(params, meta_params)

    def _said(self, params: Params, meta_params: Params) -> Tensor:
        last = params[self.neurons[-1]]
        if self.readout == "squared error":
            return last
        return self.call(meta_params, len(self.neurons), last)

    def hebbian(
        self, x: Tensor, states: Sequence[Params], weights: Sequence[float]
    ) -> dict[str, Tensor]:
        r"""The local update: `-Σ_i w_i ∂Φ/∂θ(s_i)` by products of activities, without autograd.

            Δ̂W_l = -Σ_i w_i s_l(i) s_{l-1}(i)ᵀ

        With the settled states of the phases of `Contrastive`, and its weights divided by β, this
        is its gradient for all connections between neurons.

        Args:
            x: inputs.
            states: the settled neurons of each phase.
            weights: one number for each state.

        Returns:
            One tensor for each parameter, by name; the readout's parameters are left out.

        Raises:
            ConfigurationError: a connection has no such product in closed form.
        """
        total: dict[str, Tensor] = {}
        names = self._names()
        for state, weight in zip(states, weights, strict=True):
            before = x
            for i, name in enumerate(self.neurons):
                products = coactivity(self.connections[i], before, state[name])
                for local, product in products.items():
                    key = names[f"connections.{i}.{local}"]
                    total[key] = total.get(key, 0) - weight * product
                before = state[name]
        return total

    def forward(self, connection: int, activity: Tensor) -> Tensor:
        """The output of a connection.

        Args:
            connection: its index.
            activity: activity of the layer in front of it.
        """
        return self.connections[connection](activity)

    def call(self, meta_params: Params, connection: int, activity: Tensor) -> Tensor:
        """The output of a connection, with other parameters."""
        functional = self._functional or self._follow()
        return functional(meta_params, connection, activity)

    def _follow(self) -> Functional:
        """The functional, with the network's current modules and training flags."""
        parts = [*self.modules(), *dict(self.named_parameters(remove_duplicate=False)).values()]
        same = len(parts) == len(self._made_of) and all(map(operator.is_, parts, self._made_of))
        if self._functional is None or not same:
            self._functional = Functional(copy.deepcopy(self).requires_grad_())
            self._made_of = parts
        for own, part in zip(self._functional.model.modules(), self.modules(), strict=True):
            own.training = part.training
        return self._functional

    def _loss(self, y: Tensor) -> Callable[[Params, Params], Tensor]:
        if self.readout == "cross-entropy":
            return lambda params, meta: cross_entropy(self._said(params, meta), y)

        def squared_error(params: Params, meta_params: Params) -> Tensor:
            nonlocal y
            output = params[self.neurons[-1]]
            if y.shape != output.shape:
                with labelling(y, output):
                    one = nn.functional.one_hot(y, output.shape[-1])
                    y = one.to(output.real.dtype).view(output.shape)
            return 0.5 * (output - y).square().sum()

        return squared_error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_functional": None, "_made_of": []}


class _Energy:
    """The primitive function Φ of a network with a clamped input."""

    def __init__(self, net: Hopfield, x: Tensor) -> None:
        self.net, self.x = net, x
        self._given: tuple[list[Tensor], list[int]] = [], []
        self._first = x

    def __call__(self, params: Params, meta_params: Params) -> Tensor:
        """`Φ(s, θ)`."""
        return self._driven_by(self._drive(meta_params), params, meta_params)

    def at(self, meta_params: Params) -> Callable[[Params], Tensor]:
        """Φ at fixed θ; the input's drive on the first layer is computed once."""
        if draws(self.net.connections[0]):  # the same numbers in the same order as Φ
            return lambda params: self(params, meta_params)
        tensors = list(meta_params.values())
        versions = [t._version for t in tensors]
        before, known = self._given
        same = versions == known and all(map(operator.is_, tensors, before))
        if not same:  # the phases of one meta-gradient have the same θ
            with torch.no_grad():
                self._first = self._drive(meta_params)
            self._given = tensors, versions
        drive = self._first
        return lambda params: self._driven_by(drive, params, meta_params)

    def _drive(self, meta_params: Params) -> Tensor:
        dtype = next(iter(meta_params.values())).dtype  # complex in a holomorphic scheme
        return self.net.call(meta_params, 0, self.x.to(dtype))

    def _driven_by(self, drive: Tensor, params: Params, meta_params: Params) -> Tensor:
        layers = [params[name] for name in self.net.neurons]
        total = _product(layers[0], drive)
        for i, (before, after) in enumerate(pairwise(layers), start=1):
            total = total + _product(after, self.net.call(meta_params, i, before))
        return total


def _product(one: Tensor, other: Tensor) -> Tensor:
    """`Σ one · other`, without complex conjugation."""
    return torch.dot(one.reshape(-1), other.reshape(-1))


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    r"""`Σ_samples log Σ_j e^{z_j} - z_y`, holomorphic in complex logits.

    Args:
        logits: samples x classes.
        y: class of each sample.
    """
    if not logits.is_complex():
        return summed_cross_entropy(logits, y)
    largest = logits.detach().real.amax(1, keepdim=True)
    shares = (logits - largest).exp().sum(1).log() + largest.squeeze(1)
    return (shares - logits.gather(1, y[:, None]).squeeze(1)).sum()


def _activation(what: str, given: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if isinstance(given, str) and given in ACTIVATIONS:
        return ACTIVATIONS[given]
    if callable(given):
        return given
    raise ConfigurationError(
        f"{what} must be one of {', '.join(map(repr, ACTIVATIONS))}, or a function, got {given!r}"
    )
