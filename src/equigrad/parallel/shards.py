"""Parameters that are spread over several processes, as torch's `DTensor`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Params = Mapping[str, Tensor]


def mesh_of(tensor: Tensor) -> Any:
    """The mesh of processes that a tensor lies on; None for an ordinary tensor."""
    return getattr(tensor, "device_mesh", None)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor as an ordinary one, with its graph; an ordinary tensor is not copied."""
    return tensor if mesh_of(tensor) is None else _Whole.apply(tensor)  # pyright: ignore


@dataclass(frozen=True)
class Layout:
    """How named tensors are spread over processes.

    Attributes:
        mesh: the mesh of processes.
        placements: placement of each tensor; tensors that are not named are replicated.
    """

    mesh: Any = None
    placements: Mapping[str, tuple[Any, ...]] | None = None

    @classmethod
    def of(cls, tensors: Params, mesh: Any) -> "Layout":
        """The layout of these tensors."""
        return cls(mesh, {n: _placements(t) for n, t in tensors.items() if mesh_of(t) is not None})

    def laid_out(self, tensors: Params, *, others: bool = False) -> dict[str, Tensor]:
        """Whole tensors spread over processes in this layout."""
        if self.mesh is None or self.placements is None:
            return dict(tensors)
        replicated = _replicated(self.mesh) if others else None
        found = {}
        for name, tensor in tensors.items():
            where = self.placements.get(name, replicated)
            found[name] = tensor if where is None else _Placed.apply(self.mesh, where, tensor)
        return found


@dataclass(frozen=True)
class OnShards:
    """A loss of sharded tensors, as a function of whole ones.

    Attributes:
        function: the loss.
        params: layout of φ.
        meta_params: layout of θ.
    """

    function: Callable[..., Any]
    params: Layout
    meta_params: Layout

    def __call__(self, params: Params, meta_params: Params, *batch: Any) -> Any:
        """The loss, as an ordinary tensor."""
        loss = self.function(
            self.params.laid_out(params, others=True),
            self.meta_params.laid_out(meta_params, others=True),
            *batch,
        )
        return whole(loss) if isinstance(loss, Tensor) else loss


def meshes(tensors: Iterable[Tensor]) -> list[Any]:
    """The different meshes that some tensors lie on."""
    found: list[Any] = []
    for mesh in map(mesh_of, tensors):
        if mesh is not None and mesh not in found:
            found.append(mesh)
    return found


class _Placed(torch.autograd.Function):
    """A whole tensor spread over processes; the transpose is `_Whole`, and vice versa.

    Torch's own redistribution has no second derivative.
    """

    @staticmethod
    def forward(ctx: Any, mesh: Any, placements: Any, tensor: Tensor) -> Tensor:  # pyright: ignore
        from torch.distributed.tensor import DTensor

        here = DTensor.from_local(tensor.detach(), mesh, _replicated(mesh), run_check=False)
        return here.redistribute(mesh, placements)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        return None, None, whole(grad)


class _Whole(torch.autograd.Function):
    """A tensor that is spread over processes, as an ordinary tensor on each."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:  # pyright: ignore
        ctx.mesh, ctx.placements = tensor.device_mesh, _placements(tensor)
        return tensor.detach().full_tensor()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        return _Placed.apply(ctx.mesh, ctx.placements, grad)


def _placements(tensor: Any) -> tuple[Any, ...]:
    """The placements of a tensor; replicated where each process holds a summand."""
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() if p.is_partial() else p for p in tensor.placements)


def _replicated(mesh: Any) -> tuple[Any, ...]:
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() for _ in range(mesh.ndim))
