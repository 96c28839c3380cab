"""Parameters that lie on several processes: torch's `DTensor`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Params = Mapping[str, Tensor]


def mesh_of(tensor: Tensor) -> Any:
    """The mesh of processes that a tensor lies on; None of an ordinary one."""
    return getattr(tensor, "device_mesh", None)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, as an ordinary one, with its graph; itself if it is one."""
    return tensor if mesh_of(tensor) is None else _Whole.apply(tensor)  # pyright: ignore


@dataclass(frozen=True)
class Layout:
    """How named tensors lie on processes.

    Attributes:
        mesh: of the processes.
        placements: of each tensor; replicated where it is not named.
    """

    mesh: Any = None
    placements: Mapping[str, tuple[Any, ...]] | None = None

    @classmethod
    def of(cls, tensors: Params, mesh: Any) -> "Layout":
        """That of these tensors."""
        return cls(mesh, {n: _placements(t) for n, t in tensors.items() if mesh_of(t) is not None})

    def laid_out(self, tensors: Params, *, others: bool = False) -> dict[str, Tensor]:
        """Whole tensors as they lie on processes; the others replicated, if asked for."""
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
        params: how φ lies on processes.
        meta_params: how θ does.
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
    """A whole tensor, laid out on processes; its transpose is `_Whole`, and that of that is this.

    torch's own redistribution has no second derivative.
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
    """A tensor that lies on processes, as an ordinary one on each."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:  # pyright: ignore
        ctx.mesh, ctx.placements = tensor.device_mesh, _placements(tensor)
        return tensor.detach().full_tensor()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        return _Placed.apply(ctx.mesh, ctx.placements, grad)


def _placements(tensor: Any) -> tuple[Any, ...]:
    """Where a tensor lies; replicated where each process has a summand of it."""
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() if p.is_partial() else p for p in tensor.placements)


def _replicated(mesh: Any) -> tuple[Any, ...]:
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() for _ in range(mesh.ndim))
