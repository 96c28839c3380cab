"""Two autograd functions that communicate between ranks, each the transpose of the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], None]
"""Sums a tensor over ranks, in place."""


class Spread(torch.autograd.Function):
    r"""The identity on tensors that all ranks share, whose transpose sums gradients over ranks.

        x ↦ x        with the transpose    g_r ↦ Σ_r g_r

    The gradients of all tensors are summed in one call, whichever of them a rank has used. The last
    output is a scalar zero. A loss that includes it reaches this function in the backward pass even
    if it depends on nothing else, so that no rank waits for another.
    """

    @staticmethod
    def forward(reduce: AllReduce, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore
        """The tensors, and the zero."""
        return *(t.view_as(t) for t in tensors), _real(tensors[0]).new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the reduction and the shapes."""
        ctx.reduce, tensors = inputs[0], inputs[1:]
        ctx.like = [_Like.of(t) for t in tensors]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Sums of the gradients that are needed."""
        wanted = ctx.needs_input_grad[1:]
        mine = [
            like.zeros() if g is None else g
            for g, like, w in zip(grads, ctx.like, wanted, strict=False)
            if w
        ]
        anchor = [] if grads[-1] is None else [grads[-1]]
        found = iter(Gather.apply(ctx.reduce, *mine, *anchor))
        return None, *(next(found) if w else None for w in wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        """The tangents, which all ranks share as well."""
        moved = [
            like.zeros() if t is None else t.view_as(t)
            for t, like in zip(tangents[1:], ctx.like, strict=True)
        ]
        return *moved, _real(moved[0]).new_zeros(())


class Gather(torch.autograd.Function):
    r"""The sum over ranks of tensors that differ: `x_r ↦ Σ_r x_r`, the transpose of `Spread`."""

    @staticmethod
    def forward(reduce: AllReduce, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore
        """The sums, which are the same on all ranks."""
        return tuple(summed(reduce, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the reduction."""
        ctx.reduce = inputs[0]
        ctx.like = [_Like.of(t) for t in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The same gradient on every rank, for its contribution."""
        return None, *Spread.apply(ctx.reduce, *grads)[:-1]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        """The sums of the tangents."""
        moves = [
            like.zeros() if t is None else t for t, like in zip(tangents[1:], ctx.like, strict=True)
        ]
        return Gather.apply(ctx.reduce, *moves)


def summed(reduce: AllReduce, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums of tensors over ranks, at least in float32, in one call for each dtype and device."""
    dense = [(t.to_dense() if t.is_sparse else t).detach() for t in tensors]
    kinds = [(torch.promote_types(t.dtype, torch.float32), t.device) for t in dense]
    found = list(dense)
    for kind in dict.fromkeys(kinds):
        places, dtype = [i for i, k in enumerate(kinds) if k == kind], kind[0]
        flat = torch.cat([dense[i].reshape(-1).to(dtype) for i in places])
        reduce(_real(flat))
        for i, part in zip(places, flat.split([dense[i].numel() for i in places]), strict=True):
            found[i] = part.to(dense[i].dtype, copy=True).view(dense[i].shape)
    return found


@dataclass(frozen=True)
class _Like:
    """The properties of a tensor, without its memory."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "_Like":
        """The properties of this tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def zeros(self) -> Tensor:
        """A tensor of zeros with these properties."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


def _real(tensor: Tensor) -> Tensor:
    """The same memory as real numbers."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
