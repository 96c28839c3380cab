"""Gradients around a settled state, in their parts for φ and θ, and displacements."""

import math
from dataclasses import dataclass

from torch import Tensor

from equigrad.problems import Params
from equigrad.vectors import flatten

STRETCH = 8.0
"""The largest factors by which `balanced` lengthens the step in θ and shortens that in φ."""


@dataclass(frozen=True)
class Slope:
    """A scalar and its gradient with respect to φ and θ, each as a flat vector."""

    value: Tensor
    params: Tensor
    meta: Tensor

    def differs(self, other: "Slope") -> float:
        """The difference to another slope, relative to this one's size."""
        size = max(_norm(self), self.value.abs().item() / max(len(self.params) ** 0.5, 1.0))
        change = self.minus(other)
        apart = max(_norm(change), change.value.abs().item())
        return apart / size if size else float(apart > 0)

    def minus(self, other: "Slope") -> "Slope":
        """The difference of two slopes."""
        return Slope(self.value - other.value, self.params - other.params, self.meta - other.meta)

    def times(self, scale: float) -> "Slope":
        """The slope with its gradient scaled."""
        return Slope(self.value, scale * self.params, scale * self.meta)


def _norm(slope: Slope) -> float:
    return math.hypot(slope.params.norm().item(), slope.meta.norm().item())


@dataclass(frozen=True)
class Move:
    """A displacement of φ and θ."""

    params: dict[str, Tensor]
    meta: dict[str, Tensor]

    def times(self, scale: float) -> "Move":
        """The displacement, scaled."""
        params, meta = (
            {n: scale * t for n, t in part.items()} for part in (self.params, self.meta)
        )
        return Move(params, meta)


def balanced(move: Move, change: Slope) -> Move:
    """A direction whose parts in φ and in θ change the gradient by similar amounts."""
    params, meta = (expected(part, change) for part in (Move(move.params, {}), Move({}, move.meta)))
    ratio = params / meta if params and meta else 1.0
    longer, shorter = min(max(ratio, 1 / STRETCH), STRETCH), min(max(ratio / STRETCH, 1.0), STRETCH)
    return Move(
        {n: t / shorter for n, t in move.params.items()},
        {n: t * longer for n, t in move.meta.items()},
    )


def dot(move: Move, slope: Slope) -> float:
    """The inner product of a direction and a gradient."""
    return (flat(move.params).dot(slope.params) + flat(move.meta).dot(slope.meta)).item()


def expected(move: Move, slope: Slope) -> float:
    """The typical size of the inner product of a random direction and a vector."""
    parts = ((move.params, slope.params), (move.meta, slope.meta))
    return sum(flat(d).norm().item() * s.norm().item() / len(s) ** 0.5 for d, s in parts if d)


def flat(tensors: Params) -> Tensor:
    """All tensors as one vector."""
    return flatten([t.detach() for t in tensors.values()])
