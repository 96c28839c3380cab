"""Energy-based networks, whose neurons settle at a stationary point of an energy."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from equigrad.errors import ProblemError
from equigrad.fields import Rule
from equigrad.problems.problem import Loss, Part, Problem
from equigrad.problems.pullback import Params, Velocity, slope
from equigrad.randomness import Stream

Activation = Annotated[
    Callable[[Tensor], Tensor], Rule("that acts on each element, such as torch.tanh")
]
"""An activation function: elementwise and nowhere decreasing."""


@runtime_checkable
class Primitive(Protocol):
    """A primitive function with a cheaper form for many steps at the same θ."""

    def __call__(self, params: Params, meta_params: Params) -> Tensor:
        """`Φ(s, θ)`, a scalar."""
        ...

    def at(self, meta_params: Params) -> Callable[[Params], Tensor]:
        """A function of s alone with the same `∂Φ/∂s`."""
        ...


@dataclass(frozen=True)
class EnergyBased(Problem):
    r"""An energy-based network, whose neurons settle at a stationary point of an energy.

        min_θ L_out(s*(θ), θ)    with    s* = ρ(∂Φ/∂s(s*, θ))

    which is a stationary point of the energy `E(s, θ) = Σ_i G(s_i) - Φ(s, θ)` with `G' = ρ⁻¹`
    (Hopfield 1984; in terms of the primitive function Φ, Ernoult et al. 2019). For the hard
    sigmoid, `G = ½s²` on [0, 1], and s* is a minimum in that box. The velocity of a phase is
    `ρ(∂Φ/∂s - β ∂L_out/∂s) - s`: the nudge acts on a neuron's drive, and the settled state is
    stationary for `E + β L_out`. The contrastive rule therefore gives the gradient with respect to
    θ; for a network this is equilibrium propagation (Scellier, Bengio 2017). Φ need not be
    differentiated twice.

    For `Φ = Σ s_l·W_l s_{l-1}`, `-∂E/∂W_l = s_l s_{l-1}ᵀ`, so that the contrast is local: the
    difference, between two phases, of the product of the two neurons that a weight connects.

    Args:
        primitive: `(params, meta_params) -> Φ`, a scalar, summed over samples. If it has a method
            `at(meta_params)` (see `Primitive`), the cheaper form which that returns is used.
        outer_loss: `(params, meta_params) -> scalar`, also summed over samples, so that β does not
            depend on their number. May depend on θ directly.
        activation: ρ of all neurons, or by name of `params`; elementwise and nowhere decreasing.
        modules: as for `Bilevel`.
        reaches: as for `Bilevel`, for Φ and the outer loss.
        samples: as for `FixedPoint`.

    Raises:
        ProblemError: primitive, loss or activation is not callable.

    Example:
        >>> import torch, equigrad as eg
        >>> problem = eg.EnergyBased(
        ...     primitive=lambda s, m: 0.25 * s["h"] @ (m["w"] + m["w"].T) @ s["h"] + s["h"].sum(),
        ...     outer_loss=lambda s, m: 0.5 * s["h"].square().sum(),
        ...     activation=torch.tanh,
        ... )
        >>> result = eg.meta_gradient(
        ...     problem,
        ...     {"h": torch.zeros(2)},
        ...     {"w": torch.tensor([[0.0, 0.5], [0.5, 0.0]])},
        ...     solver=eg.Picard(tol=1e-6),
        ...     estimator=eg.Contrastive(beta=1e-2, scheme="symmetric"),
        ... )
        >>> result.grads["w"][0, 1] > 0
        tensor(True)
    """

    energy: ClassVar[bool] = True

    primitive: Loss
    outer_loss: Loss
    activation: Activation | Mapping[str, Activation]
    modules: tuple[nn.Module, ...] | None = None
    reaches: Mapping[Stream, Collection[str]] | None = None
    samples: bool = False

    inner_batches = None
    outer_batches = None

    def function(self, stream: Stream) -> Loss:
        """Φ or the outer loss."""
        return self.primitive if stream == "inner" else self.outer_loss

    def name(self, stream: Stream) -> str:
        """The name of a function: `primitive` or `outer_loss`."""
        return "primitive" if stream == "inner" else "outer_loss"

    def evaluate(self, stream: Stream, params: Params, meta_params: Params, step: int = 0) -> Any:
        """`-Φ`, the only part of the energy that θ acts on, or the outer loss."""
        value = super().evaluate(stream, params, meta_params, 0)
        return -value if stream == "inner" and isinstance(value, Tensor) else value

    def respond(self, drives: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The activities `ρ(drive)`, by name.

        Raises:
            ProblemError: there is no activation of that name.
        """
        rho = self.activation
        if not isinstance(rho, Mapping):
            return {name: rho(drive) for name, drive in drives.items()}
        missing = [name for name in drives if name not in rho]
        if missing:
            raise ProblemError(
                f"activation lacks a function for {missing[0]!r}; it has functions for "
                f"{', '.join(map(repr, rho))}"
            )
        return {name: rho[name](drive) for name, drive in drives.items()}

    def parts(self, params: Params, meta_params: Params, step: int = 0) -> Iterator[Part]:
        """Φ, the outer loss and the activations."""
        yield from super().parts(params, meta_params, step)
        energy = self.evaluate("inner", params, meta_params, step)
        drives = slope(energy, list(params.values()), -1.0)
        leaves = [drive.detach().requires_grad_() for drive in drives]

        def response() -> Tensor:
            images = self.respond(dict(zip(params, leaves, strict=True)))
            return torch.stack([image.sum() for image in images.values()]).sum()

        yield Part("activation", response, leaves, of_data=False)

    def residual(self, params: Params, meta_params: Params, step: int = 0) -> tuple[Tensor, ...]:
        """`s - ρ(∂Φ/∂s)`, with its graph: differentiating it takes a double backward."""
        energy = self.evaluate("inner", params, meta_params, step)
        grads = torch.autograd.grad(
            -energy,
            list(params.values()),
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        image = self.respond(dict(zip(params, grads, strict=True)))
        return tuple(p - image[name] for name, p in params.items())

    def velocity_at(
        self, meta_params: Params, beta: complex, force: Params | None = None
    ) -> Velocity:
        """`ρ(∂Φ/∂s - β ∂L_out/∂s) - s` at fixed θ and β, as a function for a solver's loop."""
        phi = self.primitive
        primitive = (
            phi.at(meta_params) if isinstance(phi, Primitive) else lambda s: phi(s, meta_params)
        )

        def velocity(params: Params, step: int) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
            leaves = list(params.values())
            with torch.enable_grad():
                self.seed("inner", 0)
                total = primitive(params)
                if beta != 0 and force is None:
                    total = total - beta * self.evaluate("outer", params, meta_params, step)
            drives = dict(zip(params, slope(total, leaves), strict=True))
            if beta != 0 and force is not None:
                drives = {name: d - beta * force[name] for name, d in drives.items()}
            image = self.respond(drives)
            moves = tuple(image[name] - p for name, p in params.items())
            return moves, lambda: self.total_inner_loss(params, meta_params)

        return velocity
