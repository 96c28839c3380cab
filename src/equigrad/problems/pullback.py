"""Derivatives of scalars and vector-Jacobian products of maps, for all kinds of problem."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

Params = Mapping[str, Tensor]
"""Named tensors: what `dict(module.named_parameters())` gives and `functional_call` takes."""

Velocity = Callable[[Params, int], tuple[tuple[Tensor, ...], Callable[[], Tensor]]]
"""`(params, step) -> velocity, value`.

The velocity has one tensor for each of `params`, in their order. `value`, called before they move,
returns the loss there, at no cost but that of the regulariser.
"""


def slope(loss: Tensor, leaves: Sequence[Tensor], scale: complex = 1.0) -> tuple[Tensor, ...]:
    """`scale ∂loss/∂leaf` for every leaf; the holomorphic derivative for complex numbers."""
    seed = scalar(scale, loss)
    grads = filled(torch.autograd.grad(loss, leaves, seed, allow_unused=True), leaves)
    return tuple(g.conj().resolve_conj() for g in grads) if loss.is_complex() else grads


def filled(grads: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients as dense tensors, zero where autograd found no path to a leaf."""
    if any(g is None or g.is_sparse for g in grads):
        pairs = zip(grads, leaves, strict=True)
        grads = [torch.zeros_like(p, requires_grad=False) if g is None else g for g, p in pairs]
        return dense(tuple(grads))
    return cast(tuple[Tensor, ...], grads)


def dense(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients as dense tensors; an embedding with `sparse=True` has a sparse gradient."""
    if any(g.is_sparse for g in grads):
        return tuple(g.to_dense() if g.is_sparse else g for g in grads)
    return grads


def pull_back(
    outputs: Sequence[Tensor],
    adjoints: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    retain_graph: bool = False,
) -> tuple[Tensor, ...]:
    """`Σ (∂output/∂input)ᵀ adjoint` for every input; outputs may depend on none of the inputs."""
    varying = [(o, a) for o, a in zip(outputs, adjoints, strict=True) if o.requires_grad]
    if not varying:
        return tuple(torch.zeros_like(i, requires_grad=False) for i in inputs)
    outs, along = zip(*varying, strict=True)
    return filled(
        torch.autograd.grad(outs, inputs, along, retain_graph=retain_graph, allow_unused=True),
        inputs,
    )


def pushed(velocity: Velocity, beta: complex, force: Params) -> Velocity:
    """A velocity with an added constant force: the velocity of `L_in + β force·φ`."""
    forces = tuple(force.values())
    betas = [scalar(-beta, f).expand_as(f) for f in forces]

    def with_force(params: Params, step: int) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
        moves, value = velocity(params, step)
        moves = tuple(torch._foreach_addcmul(moves, forces, betas))
        return moves, lambda: value() + beta * inner_product(forces, params)

    return with_force


def inner_product(forces: Sequence[Tensor], params: Params) -> Tensor:
    """`force·φ`."""
    products = [(f * p).sum() for f, p in zip(forces, params.values(), strict=True)]
    return torch.stack(products).sum()


def scalar(value: complex, like: Tensor) -> Tensor:
    """A number as a tensor with the dtype and device of a loss, cached.

    As the seed of a backward pass it scales the gradient at no cost. Being a tensor, it can change
    without a recompilation of compiled steps.
    """
    dtype = like.dtype.to_complex() if isinstance(value, complex) else like.dtype
    return _scalar(value, dtype, like.device)


@lru_cache(maxsize=256)
def _scalar(value: complex, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)
