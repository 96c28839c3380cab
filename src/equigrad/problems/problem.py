"""The base class of all problems: an inner problem, which settles φ, and an outer loss."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from equigrad.buffers import find_modules
from equigrad.errors import ConfigurationError, EquigradError, ProblemError
from equigrad.fields import Checked, Rule
from equigrad.parallel import ALONE, Ranks, data_parallel, group_of, is_group
from equigrad.problems.pullback import Params, Velocity
from equigrad.problems.refused import refuse_call, refuse_module
from equigrad.problems.streams import DrawnBatches, is_sequence, may_be_batches
from equigrad.randomness import CommonRandomness, Stream

Loss = Annotated[
    Callable[..., Tensor], Rule("of (params, meta_params) that returns a scalar tensor")
]
"""`loss(params, meta_params)`, or `loss(params, meta_params, batch)` where batches are given."""

Batches = Annotated[
    Sequence[Any] | Iterable[Any],
    Rule(
        "of at least one batch that can be iterated over more than once",
        may_be_batches,
        "a generator or another iterator gives its batches only once; pass the DataLoader or the "
        "list that it was made from, or an object whose __iter__ returns a new iterator",
    ),
]
"""Mini-batches that every phase sees in the same order: a sequence, or a loader."""


class Pull(Protocol):
    """A regulariser at fixed meta-parameters, in closed form."""

    def add_velocity(self, velocity: tuple[Tensor, ...], params: Params) -> tuple[Tensor, ...]:
        """`velocity - ∂R/∂φ`, one tensor for each of `params`, in their order; without a graph."""
        ...

    def contrast(self, states: Sequence[Params], weights: Sequence[complex]) -> dict[str, Tensor]:
        """`Σ_i w_i ∂R/∂θ(φ_i)` for weights that sum to zero, without cancellation."""
        ...


class Regularizer(Protocol):
    """A term of the inner loss with derivatives in closed form.

    `equigrad.nn.ComplexSynapse` is one. Estimators that contrast phases use the factored form of
    its part of the meta-gradient; the others differentiate its value.
    """

    def penalty(self, params: Params, meta_params: Params) -> Tensor:
        """The value `R(φ, θ)`, a scalar that autograd can differentiate twice."""
        ...

    def bind(self, meta_params: Params) -> Pull:
        """The regulariser at fixed meta-parameters, for use in a loop."""
        ...

    @property
    def meta_names(self) -> frozenset[str]:
        """Names of the meta-parameters that it depends on."""
        ...


@dataclass(frozen=True)
class Part:
    """One of the functions that a problem is made of.

    Attributes:
        name: name of the function.
        value: computes a scalar.
        leaves: tensors that the scalar depends on.
        of_data: whether it may also depend on data.
    """

    name: str
    value: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    of_data: bool = True


class Problem(Checked):
    r"""A bilevel problem: what settles φ, and the outer loss of the settled φ.

    The base of `Bilevel`, `FixedPoint` and `EnergyBased`.

    A problem is defined by its residual `r(φ, θ)`, which is zero where φ has settled: the gradient
    of a loss, or `φ - F(φ, θ)` for a map. Solvers move φ along the velocity `-r`.

    Attributes:
        energy: class attribute; whether there is a loss that settling minimises.
        symmetric: class attribute; whether the residual is its gradient, so that `∂r/∂φ` is a
            Hessian.
        spreads: class attribute; whether several processes may each have a share of its data.
        samples: whether the parameters' first dimension counts samples that settle independently.
        outer_loss: the loss of the settled φ.
        regularizer: a further term of the inner loss, in closed form.
        inner_batches: mini-batches of the inner function, which settles φ.
        outer_batches: mini-batches of the outer loss.
        modules: modules that the functions call.
        reaches: names of the meta-parameters that each function depends on.
        group: processes that share its data; `ranks` represents these, or this process alone.
        randomness: seeds every evaluation by its step; None for the global generators as they are.
    """

    refusal: ClassVar[type[EquigradError]] = ProblemError
    energy: ClassVar[bool]
    symmetric: ClassVar[bool] = False
    spreads: ClassVar[bool] = False
    samples: bool = False
    group: Any = None
    ranks: Ranks = ALONE
    randomness: CommonRandomness | None = None

    outer_loss: Loss
    regularizer: Regularizer | None = None
    inner_batches: Batches | None
    outer_batches: Batches | None
    modules: tuple[nn.Module, ...] | None
    reaches: Mapping[Stream, Collection[str]] | None

    def __post_init__(self) -> None:
        if isinstance(self.modules, Iterable):
            object.__setattr__(self, "modules", tuple(self.modules))
        if self.modules is None:
            roots = (self.function("inner"), self.outer_loss, self.regularizer)
            object.__setattr__(self, "modules", find_modules(*roots))
        try:
            super().__post_init__()
            for module in self.modules or ():
                refuse_module(module, data_parallel=self.spreads)
            wrapped = [part for module in self.modules or () for part in data_parallel(module)]
            group = group_of(self.group, wrapped)
        except EquigradError as error:
            if is_group(self.group):  # other ranks may have raised no error: let them know
                Ranks(group_of(self.group, ())).tell(error)
            raise
        if group is not None or wrapped:
            object.__setattr__(self, "ranks", Ranks(group, tuple(wrapped)))

    def alone(self) -> Self:
        """The problem on this rank's share of the data."""
        return self if self.ranks.group is None else self.with_(ranks=self.ranks.alone())

    def with_(self, **changed: Any) -> Self:
        """A copy with other functions, batches, ranks or random numbers, which are not checked."""
        view = copy(self)
        for name, value in changed.items():
            object.__setattr__(view, name, value)
        return view

    def seed(self, stream: Stream, step: int) -> None:
        """Seed the random numbers of the inner or the outer function for a step."""
        if self.randomness is not None:
            self.randomness.seed(stream, step, self.ranks.stream)

    @abstractmethod
    def function(self, stream: Stream) -> Callable[..., Any]:
        """The user's function: the inner one, which settles φ, or the outer loss."""

    @abstractmethod
    def name(self, stream: Stream) -> str:
        """The name of that function."""

    @abstractmethod
    def residual(self, params: Params, meta_params: Params, step: int = 0) -> tuple[Tensor, ...]:
        """The residual, with its graph to `params` and `meta_params`.

        Args:
            params: φ; all of them require a gradient.
            meta_params: θ.
            step: number of the step, which selects the mini-batch.

        Returns:
            One tensor for each of `params`, in their order.
        """

    @abstractmethod
    def velocity_at(
        self, meta_params: Params, beta: complex, force: Params | None = None
    ) -> Velocity:
        """The velocity at fixed θ and β, as a function for a solver's loop.

        Args:
            meta_params: θ, detached.
            beta: nudging strength β, of either sign; complex if the parameters are.
            force: a constant `∂L_out/∂φ`, by name, that replaces the outer loss.

        Returns:
            `(params, step) -> velocity, value`, to be called under `torch.no_grad()` with `params`
            that all require a gradient.
        """

    def moves(self, params: Params, meta_params: Params, step: int = 0) -> tuple[Tensor, ...]:
        """Minus the residual, with its graph."""
        return tuple(-r for r in self.residual(params, meta_params, step))

    def residual_at(self, meta_params: Params) -> Callable[[Params, int], tuple[Tensor, ...]]:
        """The residual at fixed θ for a loop: `(params, step) -> r`, with its graph to φ."""
        return lambda params, step: self.residual(params, meta_params, step)

    def total_inner_loss(self, params: Params, meta_params: Params, step: int = 0) -> Tensor:
        """The inner loss with its regulariser, with its graph.

        Raises:
            ConfigurationError: the problem has no inner loss.
        """
        raise ConfigurationError(
            f"this solver compares values of the inner loss, and a {type(self).__name__} problem "
            f"has no inner loss. Use GradientDescent, which iterates the map when lr=1"
        )

    def velocity(
        self, params: Params, meta_params: Params, *, beta: float = 0.0, step: int = 0
    ) -> dict[str, Tensor]:
        """The velocity of φ, `-r - β ∂L_out/∂φ`, which is zero where φ has settled.

        Args:
            params: φ.
            meta_params: θ, held constant.
            beta: nudging strength β, of either sign.
            step: number of the step, which selects the mini-batch.

        Returns:
            One tensor for each parameter, of its shape.
        """
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        constants = {name: m.detach() for name, m in meta_params.items()}
        with torch.no_grad():
            velocity, _ = self.velocity_at(constants, beta)(leaves, step)
        return dict(zip(params, velocity, strict=True))

    def batches(self, stream: Stream) -> Sequence[Any] | None:
        """The mini-batches of the inner function or of the outer loss; None if there are none."""
        batches: Any = self.inner_batches if stream == "inner" else self.outer_batches
        if batches is None or is_sequence(batches):
            return batches
        return DrawnBatches(batches, f"{stream}_batches", torch.initial_seed())

    def drawing(
        self, randomness: CommonRandomness, device: torch.device
    ) -> tuple[Self, list[DrawnBatches]]:
        """The problem with seeded random numbers and with `DrawnBatches` for loaders, and these."""
        streams: tuple[Stream, ...] = ("inner", "outer")
        drawn = {
            name: DrawnBatches(batches, name, randomness.base, device)
            for name in (f"{stream}_batches" for stream in streams)
            if (batches := getattr(self, name)) is not None and not is_sequence(batches)
        }
        return self.with_(randomness=randomness, **drawn), list(drawn.values())

    def batch(self, stream: Stream, step: int) -> Any:
        """The mini-batch of a step."""
        batches = self.batches(stream)
        assert batches is not None
        if isinstance(batches, DrawnBatches):
            return batches.at(step)
        return batches[step % len(batches)]

    def evaluate(self, stream: Stream, params: Params, meta_params: Params, step: int = 0) -> Any:
        """The user's inner or outer function on a step's batch, without the regulariser."""
        self.seed(stream, step)
        function = self.function(stream)
        batches = self.inner_batches if stream == "inner" else self.outer_batches
        try:
            if batches is None:
                return function(params, meta_params)
            return function(params, meta_params, self.batch(stream, step))
        except TypeError:
            known = f"{stream}_batches" if f"{stream}_batches" in vars(self) else None
            refuse_call(self.name(stream), function, known, 2 if batches is None else 3)
            raise
        except RuntimeError as error:
            if "nference tensor" not in str(error) and "inference mode" not in str(error).lower():
                raise
            raise ProblemError(
                f"{self.name(stream)} uses a tensor that was made under torch.inference_mode, and "
                f"autograd cannot differentiate such tensors ({str(error).splitlines()[0]}). Call "
                f".clone() on it outside of inference_mode, or make it under torch.no_grad()"
            ) from error

    def probe(self, stream: Stream, params: Params, meta_params: Params, step: int = 0) -> Tensor:
        """A scalar with the dependences of the user's function: for a loss, the loss itself.

        Raises:
            ProblemError: the function returns an invalid value.
        """
        loss = self.evaluate(stream, params, meta_params, step)
        check_scalar(self.name(stream), loss)
        return loss

    def parts(self, params: Params, meta_params: Params, step: int = 0) -> Iterator[Part]:
        """All functions of the user, as scalars that can be differentiated."""
        streams: tuple[Stream, ...] = ("inner", "outer")
        for stream in streams:
            yield Part(
                self.name(stream),
                partial(self.evaluate, stream, params, meta_params, step),
                [*params.values(), *meta_params.values()],
            )


def check_scalar(name: str, loss: object) -> None:
    """Raise a `ProblemError` unless `loss` is a finite scalar tensor."""
    if not isinstance(loss, Tensor):
        raise ProblemError(f"{name} must return a scalar tensor, got {type(loss).__name__}")
    if loss.ndim != 0:
        raise ProblemError(
            f"{name} must return a scalar, got shape {tuple(loss.shape)}. Average over the "
            f"entries with .mean(), or with samples=True add them up with .sum()"
        )
    if loss.is_complex():
        raise ProblemError(
            f"{name} returns a complex number, which has no minimum. Return a real number, for "
            f"example its .abs() or .real"
        )
    if loss.is_meta:
        raise ProblemError(
            f"{name} returns a tensor on the meta device, which has no values. Move the module "
            f"and the data that it uses to a real device"
        )
    if not torch.isfinite(loss):
        raise ProblemError(
            f"{name} is {loss.item()} at the initial params. Start from params where it is "
            f"finite, and check the data for NaN and infinite values"
        )
