"""Hessian products by contrast: from first-order gradients on both sides of a settled state."""

import dataclasses

import torch
from torch import Tensor

from equigrad.evaluation import Evaluation
from equigrad.solvers import Settled
from equigrad.vectors import flatten, unflatten

FACTOR = 8.0
"""Between two distances that are compared."""

MOST = 5
"""Distances that are tried further, after the first two."""


class ContrastProducts:
    r"""Products with the derivatives of `∂L_in/∂φ` where a phase ended, by central differences.

        H v ≈ ‖v‖ [ ∂L_in/∂φ(φ + h v/‖v‖) - ∂L_in/∂φ(φ - h v/‖v‖) ] / 2h,    H = ∂²L_in/∂φ²

    and likewise for `(∂²L_in/∂θ∂φ) v` with `∂L_in/∂θ`: no gradient is differentiated. The error of
    a difference is the curvature's change over h, of order h², and the gradients' rounding divided
    by h. The distance h is the best of a few, found along the first vector: that at which two
    neighbouring distances differ the least. How much they differ there is the products' accuracy,
    relative to their size.

    Args:
        evaluation: evaluates, and counts two gradient evaluations a product and batch.
        at: where the phase ended.

    Attributes:
        distance: h; None before the first product.
        accuracy: of a product, relative to its size.
        largest: the largest curvature `‖H v‖ / ‖v‖` that was met.
    """

    samples = False
    symmetric = True

    def __init__(self, evaluation: Evaluation, at: Settled) -> None:
        self._evaluation, self._at = evaluation, at
        self._velocity = evaluation.free_velocity()
        self.leaves = [p.detach() for p in at.params.values()]
        self.params = list(at.params)
        self.size = sum(p.numel() for p in self.leaves)
        self.distance: float | None = None
        self.accuracy = 0.0
        self.largest = 0.0

    def product(self, vector: Tensor) -> Tensor:
        """`H vector`, a flat vector."""
        size = vector.norm()
        if not size > 0:
            return torch.zeros_like(vector)
        unit = vector / size
        if self.distance is None:
            self._choose(unit)
        assert self.distance is not None
        image = self._difference(unit, self.distance)
        self.largest = max(self.largest, image.norm().item())
        return size * image

    def mixed(self, vector: Tensor) -> dict[str, Tensor]:
        """`(∂²L_in/∂θ∂φ) vector`, by name of the meta-parameter."""
        size = vector.norm().item()
        if not size > 0:
            return {n: torch.zeros_like(m) for n, m in self._evaluation.meta_params.items()}
        if self.distance is None:
            self._choose(vector / size)
        assert self.distance is not None
        epsilon = self.distance / size
        sides = [
            dataclasses.replace(self._at, params=self._moved(epsilon * vector)),
            dataclasses.replace(self._at, params=self._moved(-epsilon * vector)),
        ]
        return self._evaluation.contrast(sides, [1 / (2 * epsilon), -1 / (2 * epsilon)])

    def _choose(self, unit: Tensor) -> None:
        """Find the distance at which the products along a direction are the most accurate."""
        start = [p.to(q.dtype) for p, q in zip(self._start(), self.leaves, strict=True)]
        moved = torch._foreach_sub(self.leaves, start)
        scale = max(_norm(self.leaves), _norm(list(moved))) or 1.0
        first = scale * torch.finfo(unit.dtype).eps ** (1 / 3)
        tried = {h: self._difference(unit, h) for h in (first, first / FACTOR)}
        apart = {first: _apart(tried[first], tried[first / FACTOR])}
        step = FACTOR
        for _ in range(MOST):
            best = min(apart, key=lambda h: apart[h])
            for h in (best * step, best / step):
                if h not in apart:
                    break
            else:
                break
            for side in (h, h / FACTOR):
                if side not in tried:
                    tried[side] = self._difference(unit, side)
            apart[h] = _apart(tried[h], tried[h / FACTOR])
        best = min(apart, key=lambda h: apart[h])
        self.distance, self.accuracy = best / FACTOR**0.5, apart[best]

    def _start(self) -> list[Tensor]:
        return list(self._evaluation.params.values())

    def _difference(self, unit: Tensor, distance: float) -> Tensor:
        """`[g(φ + h u) - g(φ - h u)] / 2h`."""
        there = self._gradient(self._moved(distance * unit))
        back = self._gradient(self._moved(-distance * unit))
        return (there - back) / (2 * distance)

    def _moved(self, vector: Tensor) -> dict[str, Tensor]:
        moves = unflatten(vector, self.leaves)
        return dict(zip(self.params, torch._foreach_add(self.leaves, moves), strict=True))

    @torch.no_grad()
    def _gradient(self, params: dict[str, Tensor]) -> Tensor:
        """`∂L_in/∂φ`, averaged over batches, with the randomness of the phase's end."""
        self._evaluation.stand_at(self._at)
        leaves = {name: p.requires_grad_() for name, p in params.items()}
        steps = self._evaluation.batch_steps("inner")
        total: Tensor | None = None
        for step in steps:
            velocity, _ = self._velocity(leaves, step)
            self._evaluation.gradient_evaluations += 1
            flat = flatten(list(velocity))
            total = flat if total is None else total + flat
        assert total is not None
        return -total / len(steps)


def _norm(tensors: list[Tensor]) -> float:
    return torch.stack([n.double() for n in torch._foreach_norm(tensors)]).norm().item()


def _apart(one: Tensor, other: Tensor) -> float:
    """How much two products differ, relative to their size."""
    size = max(one.norm().item(), other.norm().item())
    return (one - other).norm().item() / size if size > 0 else 0.0
