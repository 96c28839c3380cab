"""Problems whose inner parameters settle at a fixed point of a map."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from equigrad.errors import ProblemError
from equigrad.fields import Rule
from equigrad.problems.problem import Batches, Loss, Problem, check_scalar
from equigrad.problems.pullback import Params, Velocity, pushed, slope
from equigrad.randomness import Stream


@runtime_checkable
class Relaxation(Protocol):
    """A map with a cheaper form for many steps at the same θ.

    If the map draws random numbers, the cheaper form draws the same ones in the same order.
    """

    def __call__(self, params: Params, meta_params: Params) -> Mapping[str, Tensor]:
        """`F(φ, θ)`, by name."""
        ...

    def at(self, meta_params: Params) -> Callable[[Params], Mapping[str, Tensor]]:
        """The same function of φ alone."""
        ...


@dataclass(frozen=True)
class FixedPoint(Problem):
    r"""A problem whose settled state is a fixed point of a map, as in a network that relaxes.

        min_θ L_out(φ*(θ), θ)    with    φ* = F(φ*, θ)

    The Jacobian of the map need not be symmetric: deep equilibrium models and recurrent networks
    are examples. The velocity is `F(φ, θ) - φ`. A map that draws random numbers (dropout) draws the
    same ones at every step; otherwise it would have no fixed point.

    Args:
        map: `(params, meta_params) -> dict` with the names and shapes of `params`; with
            `inner_batches`, `(params, meta_params, batch) -> dict`. If it has a method
            `at(meta_params)` (see `Relaxation`), the cheaper form which that returns is used.
        outer_loss: `(params, meta_params) -> scalar`, the loss of the settled φ. May depend on θ
            directly.
        inner_batches: as for `Bilevel`; the map as a whole is the mean over batches, and every
            pass of a loader repeats the first.
        outer_batches: as for `Bilevel`.
        modules: as for `Bilevel`.
        reaches: as for `Bilevel`, for the map and the outer loss.
        samples: whether the first dimension of every parameter counts samples, whose maps are
            independent. Each sample then settles, and is reported, separately.

    Raises:
        ProblemError: map or loss is not callable, or batches cannot be iterated over again.

    Example:
        >>> import torch, equigrad as eg
        >>> problem = eg.FixedPoint(
        ...     map=lambda params, meta: {"h": torch.tanh(0.5 * params["h"] + meta["b"])},
        ...     outer_loss=lambda params, meta: params["h"].square().sum(),
        ... )
        >>> result = eg.meta_gradient(
        ...     problem,
        ...     {"h": torch.zeros(1)},
        ...     {"b": torch.ones(1)},
        ...     solver=eg.Picard(tol=1e-6),
        ...     estimator=eg.GMRES(),
        ... )
        >>> (result.params["h"] - torch.tanh(0.5 * result.params["h"] + 1)).abs().item() < 1e-6
        True
    """

    energy: ClassVar[bool] = False

    map: Annotated[
        Callable[..., Params], Rule("of (params, meta_params) that returns a dictionary of tensors")
    ]
    outer_loss: Loss
    inner_batches: Batches | None = None
    outer_batches: Batches | None = None
    modules: tuple[nn.Module, ...] | None = None
    reaches: Mapping[Stream, Collection[str]] | None = None
    samples: bool = False

    def function(self, stream: Stream) -> Callable[..., Any]:
        """The map or the outer loss."""
        return self.map if stream == "inner" else self.outer_loss

    def name(self, stream: Stream) -> str:
        """The name of a function: `map` or `outer_loss`."""
        return "map" if stream == "inner" else "outer_loss"

    def residual(self, params: Params, meta_params: Params, step: int = 0) -> tuple[Tensor, ...]:
        """`φ - F(φ, θ)`, with its graph: differentiating it takes a single backward."""
        image = self.evaluate("inner", params, meta_params, step)
        return tuple(p - image[name] for name, p in params.items())

    def residual_at(
        self,
        meta_params: Params,
    ) -> Callable[[Params, int], tuple[Tensor, ...]]:
        """`φ - F(φ, θ)` at fixed θ, with its graph to φ, as a function for a loop."""
        relax = self._map_at(meta_params)

        def residual(params: Params, step: int) -> tuple[Tensor, ...]:
            image = relax(params, step)
            return tuple(p - image[name] for name, p in params.items())

        return residual

    def _map_at(self, meta_params: Params) -> Callable[[Params, int], Mapping[str, Tensor]]:
        """The map at fixed θ."""
        if self.inner_batches is None and isinstance(self.map, Relaxation):
            relax = self.map.at(meta_params)

            def seeded(params: Params, step: int) -> Mapping[str, Tensor]:
                self.seed("inner", 0)
                return relax(params)

            return seeded
        return lambda params, step: self.evaluate("inner", params, meta_params, step)

    def velocity_at(
        self, meta_params: Params, beta: complex, force: Params | None = None
    ) -> Velocity:
        """`F(φ, θ) - φ - β ∂L_out/∂φ` at fixed θ and β, as a function for a solver's loop."""
        if force is not None and beta != 0:
            return pushed(self.velocity_at(meta_params, 0.0), beta, force)
        relax = self._map_at(meta_params)

        def velocity(params: Params, step: int) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
            image = relax(params, step)
            moves = [image[name] - p for name, p in params.items()]
            if beta != 0:
                with torch.enable_grad():
                    loss = self.evaluate("outer", params, meta_params, step)
                pressure = slope(loss, list(params.values()), -beta)
                torch._foreach_add_(moves, pressure)
            return tuple(moves), lambda: self.total_inner_loss(params, meta_params)

        return velocity

    def evaluate(self, stream: Stream, params: Params, meta_params: Params, step: int = 0) -> Any:
        """The map or the outer loss; the map draws the same random numbers in every pass."""
        step = step % len(self.batches(stream) or [None])
        return super().evaluate(stream, params, meta_params, step)

    def probe(self, stream: Stream, params: Params, meta_params: Params, step: int = 0) -> Tensor:
        """The outer loss, or the sum of the residual's entries."""
        if stream == "outer":
            return super().probe(stream, params, meta_params, step)
        image = self.evaluate("inner", params, meta_params, step)
        if not isinstance(image, Mapping) or image.keys() != params.keys():
            found = sorted(image) if isinstance(image, Mapping) else type(image).__name__
            raise ProblemError(
                f"map must return a dictionary with a tensor for each of params {sorted(params)}, "
                f"got {found}"
            )
        for name, p in params.items():
            if not isinstance(image[name], Tensor) or image[name].shape != p.shape:
                found = getattr(image[name], "shape", type(image[name]).__name__)
                raise ProblemError(
                    f"map must return {name!r} in the shape that it has in params, "
                    f"{tuple(p.shape)}, got {found}"
                )
        total = torch.as_tensor(sum((p - image[name]).sum() for name, p in params.items()))
        check_scalar("map", total)
        return total
