"""What is to be settled, and by what it is judged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from equigrad.buffers import find_modules
from equigrad.errors import ProblemError
from equigrad.randomness import CommonRandomness, Stream

Params = Mapping[str, Tensor]
"""Named tensors: what `dict(module.named_parameters())` gives and `functional_call` takes."""

Loss = Callable[..., Tensor]
"""`loss(params, meta_params)`, or `loss(params, meta_params, batch)` where batches are given."""


Velocity = Callable[[Params, int], tuple[Tensor, ...]]
"""`(params, step) -> velocity`, one tensor for each of `params`, in their order."""


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


@dataclass(frozen=True)
class Bilevel:
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

    inner_loss: Loss
    outer_loss: Loss
    regularizer: Regularizer | None = None
    inner_batches: Sequence[Any] | None = None
    outer_batches: Sequence[Any] | None = None
    modules: tuple[nn.Module, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("inner_loss", "outer_loss"):
            if not callable(getattr(self, name)):
                raise ProblemError(
                    f"{name} must be a function of (params, meta_params) that returns a scalar "
                    f"tensor, got {getattr(self, name)!r}"
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
            roots = (self.inner_loss, self.outer_loss, self.regularizer)
            object.__setattr__(self, "modules", find_modules(*roots))
        else:
            object.__setattr__(self, "modules", tuple(self.modules))

    def batches(self, stream: Stream) -> Sequence[Any] | None:
        """The batches of the inner or the outer loss."""
        return self.inner_batches if stream == "inner" else self.outer_batches

    def data_loss(
        self,
        stream: Stream,
        params: Params,
        meta_params: Params,
        step: int = 0,
        randomness: CommonRandomness | None = None,
    ) -> Tensor:
        """The user's inner or outer loss on the batch of a step, without the regulariser."""
        if randomness is not None:
            randomness.seed(stream, step)
        loss = self.inner_loss if stream == "inner" else self.outer_loss
        batches = self.batches(stream)
        if batches is None:
            return loss(params, meta_params)
        return loss(params, meta_params, batches[step % len(batches)])

    def velocity(
        self, params: Params, meta_params: Params, *, beta: float = 0.0, step: int = 0
    ) -> dict[str, Tensor]:
        """`-∂(L_in + β L_out)/∂φ`, which is zero at rest.

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
            velocity = self.velocity_at(constants, beta)(leaves, step)
        return dict(zip(params, velocity, strict=True))

    def velocity_at(
        self, meta_params: Params, beta: float, randomness: CommonRandomness | None = None
    ) -> Velocity:
        """The velocity at fixed θ and β, for a loop.

        Args:
            meta_params: θ, detached.
            beta: nudging strength β, of either sign.
            randomness: seeds the losses' random numbers; the global generators where None.

        Returns:
            `(params, step) -> velocity`, where all of `params` require a gradient. It is to be
            called without recording a graph, and returns tensors in the order of `params`.
        """
        pull = None if self.regularizer is None else self.regularizer.bind(meta_params)

        def velocity(params: Params, step: int) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                loss = self.data_loss("inner", params, meta_params, step, randomness)
                if beta != 0:
                    outer = self.data_loss("outer", params, meta_params, step, randomness)
                    loss = loss + beta * outer
            leaves = tuple(params.values())
            grads = torch.autograd.grad(loss, leaves, minus_one(loss), allow_unused=True)
            if any(g is None for g in grads):
                grads = tuple(
                    torch.zeros_like(p, requires_grad=False) if g is None else g
                    for g, p in zip(grads, leaves, strict=True)
                )
            return grads if pull is None else pull.add_velocity(grads, params)

        return velocity


def minus_one(like: Tensor) -> Tensor:
    """-1 of a tensor's type and place: seeds a backward pass that yields the negative gradient."""
    return _minus_one(like.dtype, like.device)


@cache
def _minus_one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(-1.0, dtype=dtype, device=device)
