"""Feed-forward networks whose layers relax, and the base class of networks that settle by a map."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from equigrad.errors import ConfigurationError
from equigrad.nn.batches import draws, reading, summed_cross_entropy
from equigrad.nn.parts import Parts
from equigrad.problems import FixedPoint, Params

OuterLoss = Callable[[Tensor, Tensor], Tensor]
"""`(outputs, targets) -> scalar`, summed over samples."""

Map = Callable[[Params], Mapping[str, Tensor]]
"""A map from the states, by name, to the states."""


class SettlingByMap(nn.Module):
    """A network whose states settle at the fixed point of a map made of some of its parts.

    Args:
        outer_loss: loss of the outputs and the targets, summed over samples.
    """

    def __init__(self, outer_loss: OuterLoss) -> None:
        super().__init__()
        self.outer_loss = outer_loss

    def _settles(self, paths: Mapping[str, str], output: str) -> None:
        """Set the paths of the parts, by the names that `bind` takes, and the output state."""
        self._paths, self._output = paths, output
        self._parts = Parts(self, list(paths.values()))

    def problem(self, x: Tensor, y: Tensor) -> FixedPoint:
        """The network on a batch as a problem, with the loss of its targets as outer loss."""
        return FixedPoint(
            _OnBatch(self, x),
            lambda params, meta: self.outer_loss(params[self._output], y),
            modules=(),
            reaches={"inner": [name for name, _ in self.named_parameters()], "outer": []},
            samples=True,
        )

    def logits(self, params: Params, meta_params: Params) -> Tensor:
        """The state that is the network's output."""
        return params[self._output]

    def bind(self, part: str, meta_params: Params) -> Callable[..., Tensor]:
        """A part, by its name, as a function with weights from `meta_params`."""
        return self._parts.bind(self, self._paths[part], meta_params)

    def map_on(self, x: Tensor, meta_params: Params) -> Map:
        """The map of the states on a batch, with weights from `meta_params`."""
        raise NotImplementedError


class _OnBatch:
    """The map of a network on a fixed batch, for any weights."""

    def __init__(self, net: SettlingByMap, x: Tensor) -> None:
        self._net, self._x = net, x

    def __call__(self, params: Params, meta_params: Params) -> Mapping[str, Tensor]:
        return self.at(meta_params)(params)

    def at(self, meta_params: Params) -> Map:
        return self._net.map_on(self._x, meta_params)


def refuse_buffers(name: str, part: nn.Module) -> None:
    """Raise a `ConfigurationError` if a part has buffers, as one that mixes samples does."""
    if any(True for _ in part.buffers()):
        raise ConfigurationError(
            f"{name} has buffers, as batch normalisation does, which makes samples depend on each "
            f"other; use nn.LayerNorm or nn.GroupNorm, or leave it out"
        )


class Relaxing(SettlingByMap):
    r"""A feed-forward network as a system that settles, with one state for every layer of weights.

        φ_1 = f_1(x),    φ_l = f_l(φ_{l-1}),    logits = φ_L

    where a block f_l ends with the l-th layer that has weights. Layers before it (an activation, a
    pooling) act on the state of the block below, so that a state is the membrane potential of its
    neurons. The map settles within L steps at the output of an ordinary forward pass, and the
    gradient at its fixed point is that of backpropagation. Layers above see the control that a
    controller adds to a layer.

    Args:
        model: a sequence of layers; a child with weights of its own, such as a residual block,
            counts as one layer. It is kept, not copied.
        outer_loss: loss of the last state and the targets, summed over samples.
        feedback: initial feedback weights, by name of a state. They become the parameters
            `feedback.NAME`, which no layer uses; `LinearFeedback(feedback="feedback")` drives that
            state through them.

    Raises:
        ConfigurationError: model is not a `Sequential`, has no weights, or has buffers (batch
            normalisation makes samples depend on each other); or feedback names no state.

    Example:
        >>> import torch, equigrad as eg
        >>> net = Relaxing(eg.nn.tanh_network(4, [8, 8], 3))
        >>> x, y = torch.randn(5, 4), torch.arange(5) % 3
        >>> {name: tuple(s.shape) for name, s in net.start(x).items()}
        {'0': (5, 8), '1': (5, 8), '2': (5, 3)}
        >>> result = eg.meta_gradient(
        ...     net.problem(x, y), net.start(x), dict(net.named_parameters()),
        ...     solver=eg.Picard(tol=1e-6), estimator=eg.Adjoint(solver=eg.Picard(tol=1e-6)),
        ... )
        >>> torch.allclose(net.logits(result.params, {}), net(x), atol=1e-6)
        True
    """

    def __init__(
        self,
        model: nn.Sequential,
        outer_loss: OuterLoss = summed_cross_entropy,
        feedback: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(outer_loss)
        if not isinstance(model, nn.Sequential):
            raise ConfigurationError(
                f"model must be a torch.nn.Sequential, whose layers settle one after the other, "
                f"got {type(model).__name__}"
            )
        refuse_buffers("model", model)
        blocks: list[nn.Sequential] = []
        layers: list[nn.Module] = []
        for layer in model:
            layers.append(layer)
            if any(p.ndim > 1 for p in layer.parameters()):
                blocks.append(nn.Sequential(*layers))
                layers = []
        if not blocks:
            raise ConfigurationError(
                "model has no layer with weights, so there is nothing to learn"
            )
        blocks[-1].extend(layers)
        self.blocks = nn.ModuleList(blocks)
        self._settles({str(i): f"blocks.{i}" for i in range(len(blocks))}, str(len(blocks) - 1))
        for name in feedback or {}:
            if name not in self._paths:
                raise ConfigurationError(
                    f"feedback has an entry for {name!r}, which is not one of the states: "
                    f"{', '.join(map(repr, self._paths))}"
                )
        if feedback:
            self.feedback = nn.ParameterDict(dict(feedback))

    def forward(self, x: Tensor) -> Tensor:
        """The ordinary forward pass, without relaxing."""
        for block in self.blocks:
            x = block(x)
        return x

    @torch.no_grad()
    def start(self, x: Tensor) -> dict[str, Tensor]:
        """The initial state: zeros in the shapes of the states.

        Raises:
            ProblemError: the layers cannot read such inputs.
        """
        states = {}
        sample = x[:1]
        with reading(self, x):
            for name, block in zip(self._paths, self.blocks, strict=True):
                sample = block(sample)
                states[name] = x.new_zeros(len(x), *sample.shape[1:])
        return states

    def map_on(self, x: Tensor, meta_params: Params) -> Map:
        """All blocks at once. The first sees x alone and is computed once, unless it draws."""
        names = list(self._paths)
        first, *others = (self.bind(name, meta_params) for name in names)
        once = None if draws(self.blocks[0]) else first(x)

        def sweep(params: Params) -> dict[str, Tensor]:
            image = {"0": first(x) if once is None else once}
            for below, name, block in zip(names, names[1:], others, strict=False):
                image[name] = block(params[below])
            return image

        return sweep
