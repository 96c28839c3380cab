"""What is to be settled, and by what it is judged."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from equigrad.buffers import find_modules
from equigrad.errors import ConfigurationError, ProblemError
from equigrad.randomness import CommonRandomness, Stream

Params = Mapping[str, Tensor]
"""Named tensors: what `dict(module.named_parameters())` gives and `functional_call` takes."""

Loss = Callable[..., Tensor]
"""`loss(params, meta_params)`, or `loss(params, meta_params, batch)` where batches are given."""


Velocity = Callable[[Params, int], tuple[tuple[Tensor, ...], Callable[[], Tensor]]]
"""`(params, step) -> velocity, value`.

The velocity has one tensor for each of `params`, in their order. Calling `value` before they move
gives the loss there, at no cost but that of a regulariser's.
"""


class Pull(Protocol):
    """A regulariser at fixed meta-parameters, in closed form."""

    def add_velocity(self, velocity: tuple[Tensor, ...], params: Params) -> tuple[Tensor, ...]:
        """`velocity - ∂R/∂φ`, one tensor for each of `params`, in their order; without a graph."""
        ...

    def contrast(self, states: Sequence[Params], weights: Sequence[float]) -> dict[str, Tensor]:
        """`Σ_i w_i ∂R/∂θ(φ_i)` for weights that sum to zero, without cancellation."""
        ...


class Regularizer(Protocol):
    """A term of the inner loss whose derivatives are known in closed form.

    `equigrad.nn.ComplexSynapse` is one. Estimators that contrast phases take its part of the
    meta-gradient in factored form; those that differentiate it take its value.
    """

    def penalty(self, params: Params, meta_params: Params) -> Tensor:
        """The value `R(φ, θ)`, a scalar that autograd can differentiate twice."""
        ...

    def bind(self, meta_params: Params) -> Pull:
        """The regulariser at these meta-parameters, for use in a loop."""
        ...

    @property
    def meta_names(self) -> frozenset[str]:
        """Names of the meta-parameters it depends on."""
        ...


class Problem(ABC):
    r"""What settles, and by what it is judged: the base of `Bilevel` and `FixedPoint`.

    A problem is known by its residual `r(φ, θ)`, which is zero at rest: the gradient of a loss, or
    `φ - F(φ, θ)` for a map. Solvers move φ along the velocity `-r`.

    Attributes:
        energy: class attribute; whether the residual is the gradient of a loss.
        outer_loss: judges the settled φ.
        regularizer: a further term of an inner loss, in closed form.
        inner_batches: mini-batches of what settles φ.
        outer_batches: mini-batches of the outer loss.
        modules: modules that the functions call.
        reaches: the meta-parameters that each function depends on.
    """

    energy: ClassVar[bool]
    _returned: ClassVar[str]  # what the function that settles φ has to return, in words

    outer_loss: Loss
    regularizer: Regularizer | None = None
    inner_batches: Sequence[Any] | None
    outer_batches: Sequence[Any] | None
    modules: tuple[nn.Module, ...] | None
    reaches: Mapping[Stream, Collection[str]] | None

    def __post_init__(self) -> None:
        returns: dict[Stream, str] = {"inner": self._returned, "outer": "a scalar tensor"}
        for stream, returned in returns.items():
            function = self.function(stream)
            if not callable(function):
                raise ProblemError(
                    f"{self.name(stream)} must be a function of (params, meta_params) that returns "
                    f"{returned}, got {function!r}"
                )
        for name in ("inner_batches", "outer_batches"):
            batches = getattr(self, name)
            if batches is None:
                continue
            if not (hasattr(batches, "__getitem__") and hasattr(batches, "__len__")):
                raise ProblemError(
                    f"{name} must be an indexable sequence, so that every phase can see the same "
                    f"batches in the same order, got {type(batches).__name__}; a DataLoader "
                    f"becomes one by list(loader)"
                )
            if len(batches) == 0:
                raise ProblemError(f"{name} is empty; give at least one batch, or None")
        if self.modules is None:
            roots = (self.function("inner"), self.outer_loss, self.regularizer)
            object.__setattr__(self, "modules", find_modules(*roots))
        else:
            object.__setattr__(self, "modules", tuple(self.modules))

    @abstractmethod
    def function(self, stream: Stream) -> Callable[..., Any]:
        """The user's function: what settles φ, or the outer loss."""

    @abstractmethod
    def name(self, stream: Stream) -> str:
        """What that function is called."""

    @abstractmethod
    def residual(
        self,
        params: Params,
        meta_params: Params,
        step: int = 0,
        randomness: CommonRandomness | None = None,
    ) -> tuple[Tensor, ...]:
        """What is zero at rest, with its graph back to `params` and `meta_params`.

        Args:
            params: φ; all of them require a gradient.
            meta_params: θ.
            step: which mini-batch.
            randomness: seeds the random numbers; the global generators where None.

        Returns:
            One tensor for each of `params`, in their order.
        """

    @abstractmethod
    def velocity_at(
        self, meta_params: Params, beta: float, randomness: CommonRandomness | None = None
    ) -> Velocity:
        """The velocity at fixed θ and β, for a loop.

        Args:
            meta_params: θ, detached.
            beta: nudging strength β, of either sign.
            randomness: seeds the losses' random numbers; the global generators where None.

        Returns:
            `(params, step) -> velocity, value`, where all of `params` require a gradient. It is to
            be called without recording a graph.
        """

    def total_inner_loss(
        self,
        params: Params,
        meta_params: Params,
        step: int = 0,
        randomness: CommonRandomness | None = None,
    ) -> Tensor:
        """The inner loss with its regulariser, differentiable as often as the model is.

        Raises:
            ConfigurationError: there is none.
        """
        raise ConfigurationError(
            f"this solver compares values of a loss, and a {type(self).__name__} has none; use "
            f"GradientDescent, where lr=1 iterates the map"
        )

    def velocity(
        self, params: Params, meta_params: Params, *, beta: float = 0.0, step: int = 0
    ) -> dict[str, Tensor]:
        """Where φ moves, which is zero at rest: `-r - β ∂L_out/∂φ`.

        Args:
            params: φ.
            meta_params: θ, held constant.
            beta: nudging strength β, of either sign.
            step: which mini-batch.

        Returns:
            One tensor a parameter, of its shape.
        """
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        constants = {name: m.detach() for name, m in meta_params.items()}
        with torch.no_grad():
            velocity, _ = self.velocity_at(constants, beta)(leaves, step)
        return dict(zip(params, velocity, strict=True))

    def batches(self, stream: Stream) -> Sequence[Any] | None:
        """The batches of what settles φ, or of the outer loss."""
        return self.inner_batches if stream == "inner" else self.outer_batches

    def evaluate(
        self,
        stream: Stream,
        params: Params,
        meta_params: Params,
        step: int = 0,
        randomness: CommonRandomness | None = None,
    ) -> Any:
        """What the user's function says of the batch of a step, without the regulariser."""
        if randomness is not None:
            randomness.seed(stream, step)
        function, batches = self.function(stream), self.batches(stream)
        if batches is None:
            return function(params, meta_params)
        return function(params, meta_params, batches[step % len(batches)])

    def probe(
        self,
        stream: Stream,
        params: Params,
        meta_params: Params,
        step: int = 0,
        randomness: CommonRandomness | None = None,
    ) -> Tensor:
        """A scalar that depends on all that the user's function depends on: the loss itself.

        Raises:
            ProblemError: the function does not return what it has to.
        """
        loss = self.evaluate(stream, params, meta_params, step, randomness)
        check_scalar(self.name(stream), loss)
        return loss


@dataclass(frozen=True)
class Bilevel(Problem):
    r"""A bilevel problem: the settled state minimises the inner loss.

        min_θ L_out(φ*(θ), θ)    with    φ*(θ) = argmin_φ L_in(φ, θ)

    (Zucchet et al., Eq. 1). Phases settle the augmented loss `L = L_in + β L_out` (Eq. 2).

    Args:
        inner_loss: `(params, meta_params) -> scalar`, the loss that the inner parameters φ
            minimise; with `inner_batches`, `(params, meta_params, batch) -> scalar`.
        outer_loss: the same for the loss that judges the settled φ. May depend on θ directly.
        regularizer: an optional further term of the inner loss in closed form, for example
            `equigrad.nn.ComplexSynapse`. The inner loss is then `inner_loss + regularizer`.
        inner_batches: mini-batches of the inner loss, a sequence. Step t of a phase sees batch
            `t mod len`; the loss as a whole is the mean over batches.
        outer_batches: the same for the outer loss.
        modules: modules that the losses call. Their buffers and training flags are the same at the
            start of every nudged phase and are put back after the call. By default they are looked
            for in the closures and named globals of the losses.
        reaches: names of the meta-parameters that the losses depend on, under `inner` and `outer`,
            for whoever makes many problems alike and knows. Where None, both losses are evaluated
            once before anything settles, to find out and to check them.

    Raises:
        ProblemError: a loss is not callable, or batches are not an indexable sequence.

    Example:
        >>> import torch, equigrad as eg
        >>> problem = eg.Bilevel(
        ...     inner_loss=lambda params, meta: (params["w"] - meta["target"]).square().sum(),
        ...     outer_loss=lambda params, meta: params["w"].square().sum() / 2,
        ... )
        >>> params, meta = {"w": torch.zeros(2)}, {"target": torch.tensor([1.0, 2.0])}
        >>> problem.velocity(params, meta)["w"]
        tensor([2., 4.])
    """

    energy: ClassVar[bool] = True
    _returned: ClassVar[str] = "a scalar tensor"

    inner_loss: Loss
    outer_loss: Loss
    regularizer: Regularizer | None = None
    inner_batches: Sequence[Any] | None = None
    outer_batches: Sequence[Any] | None = None
    modules: tuple[nn.Module, ...] | None = None
    reaches: Mapping[Stream, Collection[str]] | None = None

    def function(self, stream: Stream) -> Loss:
        """The inner or the outer loss."""
        return self.inner_loss if stream == "inner" else self.outer_loss

    def name(self, stream: Stream) -> str:
        """`inner_loss` or `outer_loss`."""
        return f"{stream}_loss"

    def total_inner_loss(
        self,
        params: Params,
        meta_params: Params,
        step: int = 0,
        randomness: CommonRandomness | None = None,
    ) -> Tensor:
        """The inner loss with its regulariser, differentiable as often as the model is."""
        loss = self.evaluate("inner", params, meta_params, step, randomness)
        if self.regularizer is not None:
            loss = loss + self.regularizer.penalty(params, meta_params)
        return loss

    def residual(
        self,
        params: Params,
        meta_params: Params,
        step: int = 0,
        randomness: CommonRandomness | None = None,
    ) -> tuple[Tensor, ...]:
        """`∂L_in/∂φ`, with its graph: using it once more takes a double backward."""
        return torch.autograd.grad(
            self.total_inner_loss(params, meta_params, step, randomness),
            list(params.values()),
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    def velocity_at(
        self, meta_params: Params, beta: float, randomness: CommonRandomness | None = None
    ) -> Velocity:
        """`-∂(L_in + β L_out)/∂φ` at fixed θ and β, for a loop."""
        pull = None if self.regularizer is None else self.regularizer.bind(meta_params)

        def velocity(params: Params, step: int) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
            with torch.enable_grad():
                loss = self.evaluate("inner", params, meta_params, step, randomness)
                if beta != 0:
                    outer = self.evaluate("outer", params, meta_params, step, randomness)
                    loss = loss + scalar(beta, outer) * outer
            leaves = tuple(params.values())
            grads = torch.autograd.grad(loss, leaves, scalar(-1.0, loss), allow_unused=True)
            if any(g is None for g in grads):
                grads = tuple(
                    torch.zeros_like(p, requires_grad=False) if g is None else g
                    for g, p in zip(grads, leaves, strict=True)
                )
            if self.regularizer is None or pull is None:
                return grads, loss.detach
            regularizer = self.regularizer
            value = lambda: loss.detach() + regularizer.penalty(params, meta_params)  # noqa: E731
            return pull.add_velocity(grads, params), value

        return velocity


@dataclass(frozen=True)
class FixedPoint(Problem):
    r"""The settled state is a fixed point of a map: a network that relaxes.

        min_θ L_out(φ*(θ), θ)    with    φ* = F(φ*, θ)

    Any map will do, with a symmetric Jacobian or not: deep equilibrium models, recurrent networks
    at rest. The velocity is `F(φ, θ) - φ`, so that `GradientDescent(lr=1)` iterates the map
    (Picard), and a smaller `lr` damps it.

    Args:
        map: `(params, meta_params) -> dict` with the names and shapes of `params`; with
            `inner_batches`, `(params, meta_params, batch) -> dict`.
        outer_loss: `(params, meta_params) -> scalar`, judges the settled φ. May depend on θ
            directly.
        inner_batches: as for `Bilevel`; the map as a whole is the mean over batches.
        outer_batches: as for `Bilevel`.
        modules: as for `Bilevel`.
        reaches: as for `Bilevel`, of the map and the outer loss.

    Raises:
        ProblemError: map or loss are not callable, or batches are not an indexable sequence.

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
        ...     solver=eg.GradientDescent(lr=1, tol=1e-6),
        ...     estimator=eg.GMRES(),
        ... )
        >>> result.params["h"].item() == torch.tanh(0.5 * result.params["h"] + 1).item()
        True
    """

    energy: ClassVar[bool] = False
    _returned: ClassVar[str] = "a dictionary of tensors"

    map: Callable[..., Params]
    outer_loss: Loss
    inner_batches: Sequence[Any] | None = None
    outer_batches: Sequence[Any] | None = None
    modules: tuple[nn.Module, ...] | None = None
    reaches: Mapping[Stream, Collection[str]] | None = None

    def function(self, stream: Stream) -> Callable[..., Any]:
        """The map or the outer loss."""
        return self.map if stream == "inner" else self.outer_loss

    def name(self, stream: Stream) -> str:
        """`map` or `outer_loss`."""
        return "map" if stream == "inner" else "outer_loss"

    def residual(
        self,
        params: Params,
        meta_params: Params,
        step: int = 0,
        randomness: CommonRandomness | None = None,
    ) -> tuple[Tensor, ...]:
        """`φ - F(φ, θ)`, with its graph: using it takes a single backward."""
        image = self.evaluate("inner", params, meta_params, step, randomness)
        return tuple(p - image[name] for name, p in params.items())

    def velocity_at(
        self, meta_params: Params, beta: float, randomness: CommonRandomness | None = None
    ) -> Velocity:
        """`F(φ, θ) - φ - β ∂L_out/∂φ` at fixed θ and β, for a loop."""

        def velocity(params: Params, step: int) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
            image = self.evaluate("inner", params, meta_params, step, randomness)
            moves = [image[name] - p for name, p in params.items()]
            if beta != 0:
                with torch.enable_grad():
                    loss = self.evaluate("outer", params, meta_params, step, randomness)
                pressure = torch.autograd.grad(
                    loss,
                    list(params.values()),
                    scalar(-beta, loss),
                    allow_unused=True,
                    materialize_grads=True,
                )
                torch._foreach_add_(moves, pressure)
            return tuple(moves), lambda: self.total_inner_loss(params, meta_params)

        return velocity

    def probe(
        self,
        stream: Stream,
        params: Params,
        meta_params: Params,
        step: int = 0,
        randomness: CommonRandomness | None = None,
    ) -> Tensor:
        """The outer loss, or the sum of the residual's entries."""
        if stream == "outer":
            return super().probe(stream, params, meta_params, step, randomness)
        image = self.evaluate("inner", params, meta_params, step, randomness)
        if not isinstance(image, Mapping) or image.keys() != params.keys():
            found = sorted(image) if isinstance(image, Mapping) else type(image).__name__
            raise ProblemError(
                f"map must return a tensor for every one of params {sorted(params)}, got {found}"
            )
        for name, p in params.items():
            if not isinstance(image[name], Tensor) or image[name].shape != p.shape:
                found = getattr(image[name], "shape", type(image[name]).__name__)
                raise ProblemError(
                    f"map must return {name!r} in its shape {tuple(p.shape)}, got {found}"
                )
        total = torch.as_tensor(sum((p - image[name]).sum() for name, p in params.items()))
        check_scalar("map", total)
        return total


def check_scalar(name: str, loss: object) -> None:
    """Raise a `ProblemError` unless `loss` is a finite scalar tensor."""
    if not isinstance(loss, Tensor):
        raise ProblemError(f"{name} must return a scalar tensor, got {type(loss).__name__}")
    if loss.ndim != 0:
        raise ProblemError(
            f"{name} must return a scalar, got shape {tuple(loss.shape)}; average it with .mean()"
        )
    if not torch.isfinite(loss):
        raise ProblemError(
            f"{name} is {loss.item()} at the initial params; start where it is finite"
        )


def scalar(value: float, like: Tensor) -> Tensor:
    """A number as a tensor of a loss's type and place, made once.

    As a seed of the backward pass it multiplies the gradient at no cost; as a tensor it can change
    without compiled steps having to be compiled again.
    """
    return _scalar(value, like.dtype, like.device)


@lru_cache(maxsize=256)
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)
