"""Hessian-vector products by central differences of first-order gradients at a settled state."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from equigrad.estimators.linearisation import checked
from equigrad.evaluation import Evaluation
from equigrad.solvers import Settled
from equigrad.vectors import flatten, mismatch, unflatten

FACTOR = 8.0
"""Ratio between two distances that are compared."""

COARSE = 0.02
"""Relative rounding error of a product over the shortest distance that is looked at."""

LEAST = 3.0
"""By so many of these errors products at two distances differ where a kink lies between them."""

MOST = 5
"""The most further distances to try, after the first two."""


@dataclass(frozen=True)
class Errors:
    """The relative error `a h² + b / h` of products along a direction.

    Attributes:
        a: coefficient of the change of the curvature.
        b: coefficient of rounding.
        distance: the distance with the smallest error.
    """

    a: float
    b: float
    distance: float

    def error(self, distance: float) -> float:
        """The error at a distance."""
        return self.a * distance**2 + self.b / distance

    @classmethod
    def of(cls, apart: Mapping[float, float]) -> Self:
        """The coefficients, from the differences of products at neighbouring distances.

        Products at h and at h / FACTOR differ by nearly `a h²` where h is large, and by
        `FACTOR b / h` where it is small.
        """
        best = min(apart, key=lambda h: apart[h])
        large, small = best * FACTOR, best / FACTOR
        a = apart.get(large, apart[best]) / (large if large in apart else best) ** 2
        b = apart.get(small, apart[best]) * (small if small in apart else best) / FACTOR
        distance = (b / (2 * a)) ** (1 / 3) if a > 0 else best
        return cls(a, b, min(max(distance, small), large))

    @classmethod
    def compared(cls, difference: Callable[[float], Tensor], first: float) -> Self:
        """From the products at a few distances, where to begin with `first`."""
        tried = {h: difference(h) for h in (first, first / FACTOR)}
        apart = {first: mismatch(tried[first], tried[first / FACTOR])}
        for _ in range(MOST):
            best = min(apart, key=lambda h: apart[h])
            beside = [h for h in (best * FACTOR, best / FACTOR) if h not in apart]
            if not beside:
                break
            for side in (beside[0], beside[0] / FACTOR):
                if side not in tried:
                    tried[side] = difference(side)
            apart[beside[0]] = mismatch(tried[beside[0]], tried[beside[0] / FACTOR])
        return cls.of(apart)


class ContrastProducts:
    r"""Products with the derivatives of `∂L_in/∂φ` where a phase ended, by differences.

        H v ≈ ‖v‖ [ ∂L_in/∂φ(φ + h v/‖v‖) - ∂L_in/∂φ(φ - h v/‖v‖) ] / 2h,    H = ∂²L_in/∂φ²

    and likewise for `(∂²L_in/∂θ∂φ) v` with `∂L_in/∂θ`; no gradient is differentiated. The error of
    a difference is the change of the curvature over h, of order h², plus the rounding of the
    gradients divided by h. The best distance is short where the curvature is large, and long where
    it is small. Both distances are found by comparing the products at a few distances: along the
    first vector, which usually has large curvature, and along a random vector, which is flat in
    most models. h is their geometric mean, but at most eight times the shorter one. Along both
    vectors the product is then compared with one over the shortest distance at which rounding
    leaves it a digit: a difference is that of a kink in between, and is part of the `accuracy`.
    With this choice conjugate gradients end nearest on a deep network in float32
    (`benchmarks/krylov.py`).

    Args:
        evaluation: evaluates the inner loss, and counts the gradients, two for each product and
            batch, or one.
        at: the end of a phase.
        distance: h; None to find it.
        share: h in units of `scale`; None to find it.
        forward: whether to take differences to the gradient at φ, which is computed once or known
            from settling: this halves the cost, and has an error of order h.

    Attributes:
        distance: h; None before the first product.
        accuracy: relative error of a product along the first vector.
        largest: the largest curvature `‖H v‖ / ‖v‖` so far.
        scale: the norm of φ, or of its distance from the start if that is larger.
    """

    samples = False
    symmetric = True

    def __init__(
        self,
        evaluation: Evaluation,
        at: Settled,
        *,
        distance: float | None = None,
        share: float | None = None,
        forward: bool = False,
    ) -> None:
        self._evaluation, self._at = evaluation.holding(at), at
        self._velocity = self._evaluation.velocity()
        self.leaves = [p.detach() for p in at.params.values()]
        self.params = list(at.params)
        self.size = sum(p.numel() for p in self.leaves)
        moved = torch._foreach_sub(self.leaves, list(self._evaluation.params.values()))
        self.scale = max(_norm(self.leaves), _norm(list(moved))) or 1.0
        self.distance = distance if share is None else share * self.scale
        self.accuracy = 0.0
        self.largest = 0.0
        self._here = self._gradient_here() if forward else None

    @property
    def error(self) -> float:
        """The order of a product's relative error, if the distance was given."""
        share = abs(self.distance or 0.0) / self.scale
        return share if self._here is not None else share**2

    def residual(self) -> Tensor:
        """`∂L_in/∂φ`, as a flat vector."""
        found = self._gradient_here() if self._here is None else self._here
        return found if torch.finfo(found.dtype).bits >= 32 else found.float()

    def at(self, moved: Settled) -> Self:
        """Products at other params, over the same distance."""
        return type(self)(self._evaluation, moved, distance=self.distance)

    def product(self, vector: Tensor) -> Tensor:
        """`H vector`, as a flat vector."""
        size = vector.norm()
        if not size > 0:
            return torch.zeros_like(vector)
        unit = vector / size
        if self.distance is None:
            self._choose(unit)
        assert self.distance is not None
        image = self._difference(unit, self.distance)
        self.largest = max(self.largest, image.norm().item())
        return checked(size * image, vector)

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
        """Choose the distance, from a given direction and a random one."""
        generator = torch.Generator(device=unit.device).manual_seed(0)
        noise = torch.randn(unit.shape, generator=generator, dtype=unit.dtype, device=unit.device)
        steep = self._compared(unit)
        flat = self._compared(noise / noise.norm())
        longest = FACTOR * min(steep.distance, flat.distance)
        distance = min((steep.distance * flat.distance) ** 0.5, longest)
        apart = max(self._unlike_near(v, distance) for v in (unit, noise / noise.norm()))
        self.distance, self.accuracy = distance, max(steep.error(distance), apart)

    def _unlike_near(self, unit: Tensor, distance: float) -> float:
        """How much a product differs from one close to φ, beyond rounding.

        Where a kink lies on the way, products at long distances agree with each other, but not with
        those on the near side of the kink.
        """
        there, back = self._sides(unit, distance)
        far, size = (there - back) / (2 * distance), max(there.norm().item(), back.norm().item())
        if not far.norm().item() > 0:
            return 0.0
        rounded = size / far.norm().item() + self.scale  # of the gradients, and of φ
        shortest = torch.finfo(far.dtype).eps * rounded / COARSE
        if not shortest < distance / FACTOR:
            return 0.0
        apart = mismatch(self._difference(unit, shortest), far)
        return apart if apart > LEAST * COARSE else 0.0

    def _compared(self, unit: Tensor) -> Errors:
        """The errors of products along a direction, from the products at a few distances."""
        first = self.scale * torch.finfo(self.leaves[0].dtype).eps ** (1 / 3)
        return Errors.compared(lambda h: self._difference(unit, h), first)

    def uneven(self, vector: Tensor, distance: float) -> float:
        """Relative difference of the curvatures along a vector on the two sides of φ."""
        assert self.distance is not None
        distance = max(distance, abs(self.distance))
        ahead, behind = self._sides(vector / vector.norm(), distance)
        here = self._gradient_here() if self._here is None else self._here
        return ((ahead - here + behind - here).norm() / (ahead - behind).norm()).item()

    def _difference(self, unit: Tensor, distance: float) -> Tensor:
        """`[g(φ + h u) - g(φ - h u)] / 2h`, or `[g(φ + h u) - g(φ)] / h`."""
        if self._here is not None:
            return (self._gradient(self._moved(distance * unit)) - self._here) / distance
        there, back = self._sides(unit, distance)
        return (there - back) / (2 * distance)

    def _sides(self, unit: Tensor, distance: float) -> tuple[Tensor, Tensor]:
        """The gradients at `φ ± h u`."""
        there = self._gradient(self._moved(distance * unit))
        return there, self._gradient(self._moved(-distance * unit))

    def _gradient_here(self) -> Tensor:
        """`g(φ)`; the phase that settled there has computed it."""
        if self._at.velocity is not None and self._at.phase.beta == 0:
            return -flatten(list(self._at.velocity))
        return self._gradient(self._moved(torch.zeros_like(flatten(self.leaves))))

    def _moved(self, vector: Tensor) -> dict[str, Tensor]:
        moves = unflatten(vector, self.leaves)
        return dict(zip(self.params, torch._foreach_add(self.leaves, moves), strict=True))

    @torch.no_grad()
    def _gradient(self, params: dict[str, Tensor]) -> Tensor:
        """`∂L_in/∂φ`, averaged over batches, with the random numbers of the end of the phase."""
        self._evaluation.stage.stand_at(self._at)
        leaves = {name: p.requires_grad_() for name, p in params.items()}
        steps = self._evaluation.batch_steps("inner")
        total: Tensor | None = None
        for step in steps:
            velocity, _ = self._velocity(leaves, step)
            self._evaluation.tally.spend(1)
            flat = flatten(list(velocity))
            total = flat if total is None else total + flat
        assert total is not None
        return -total / len(steps)


def _norm(tensors: list[Tensor]) -> float:
    return torch.stack([n.double() for n in torch._foreach_norm(tensors)]).norm().item()
