"""A gradient around a settled state: its value, its parts in φ and θ, and ways to go from it."""

import math
from dataclasses import dataclass

from torch import Tensor

from equigrad.problems import Params
from equigrad.vectors import flatten

STRETCH = 8.0
"""How much longer a step of θ may be made, and how much shorter one of φ, to see both alike."""


@dataclass(frozen=True)
class Slope:
    """A scalar and its gradient by φ and by θ, each a flat vector."""

    value: Tensor
    params: Tensor
    meta: Tensor

    def differs(self, other: "Slope") -> float:
        """By how much, relative to its size."""
        size = max(_norm(self), self.value.abs().item() / max(len(self.params) ** 0.5, 1.0))
        change = self.minus(other)
        apart = max(_norm(change), change.value.abs().item())
        return apart / size if size else float(apart > 0)

    def minus(self, other: "Slope") -> "Slope":
        """The difference."""
        return Slope(self.value - other.value, self.params - other.params, self.meta - other.meta)

    def times(self, scale: float) -> "Slope":
        """As many times as much."""
        return Slope(self.value, scale * self.params, scale * self.meta)


def _norm(slope: Slope) -> float:
    return math.hypot(slope.params.norm().item(), slope.meta.norm().item())


@dataclass(frozen=True)
class Move:
    """A displacement of φ and θ."""

    params: dict[str, Tensor]
    meta: dict[str, Tensor]

    def times(self, scale: float) -> "Move":
        """The same direction, as far."""
        params, meta = (
            {n: scale * t for n, t in part.items()} for part in (self.params, self.meta)
        )
        return Move(params, meta)


def balanced(move: Move, change: Slope) -> Move:
    """A direction whose parts in φ and in θ see as much of a change of the gradient."""
    params, meta = (expected(part, change) for part in (Move(move.params, {}), Move({}, move.meta)))
    ratio = params / meta if params and meta else 1.0
    longer, shorter = min(max(ratio, 1 / STRETCH), STRETCH), min(max(ratio / STRETCH, 1.0), STRETCH)
    return Move(
        {n: t / shorter for n, t in move.params.items()},
        {n: t * longer for n, t in move.meta.items()},
    )


def dot(move: Move, slope: Slope) -> float:
    """The product of a direction with a gradient."""
    return (flat(move.params).dot(slope.params) + flat(move.meta).dot(slope.meta)).item()


def expected(move: Move, slope: Slope) -> float:
    """The size of the product of a random direction with a vector."""
    parts = ((move.params, slope.params), (move.meta, slope.meta))
    return sum(flat(d).norm().item() * s.norm().item() / len(s) ** 0.5 for d, s in parts if d)


def flat(tensors: Params) -> Tensor:
    """All tensors as one vector."""
    return flatten([t.detach() for t in tensors.values()])
