"""Local tests of a problem's functions around a settled state."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from equigrad.buffers import KeptBuffers
from equigrad.problems import Params, Problem
from equigrad.randomness import CommonRandomness, Stream
from equigrad.vectors import flatten, relative

MISMATCH = 0.05
"""Relative difference above which derivatives by autograd and by differences disagree."""

ROUNDING = 30
"""A difference of fewer rounding errors of the values is not significant."""


def local_faults(
    problem: Problem, params: Params, meta_params: Params, seed: int
) -> tuple[str, ...]:
    """The faults of a problem's functions around a settled state, one sentence each.

    The tests are:

    - Two evaluations with the same seeds give the same value.
    - Derivatives with respect to φ and θ by autograd agree with central differences along a random
      direction, at a point nearby.
    - The closed forms of a regulariser are the derivatives of its penalty.
    - The velocity has no jump at the settled φ.

    Args:
        problem: the problem.
        params: the settled φ.
        meta_params: θ.
        seed: seed of the directions, and of the functions' random numbers.
    """
    found: list[str] = []
    params = {name: p.detach() for name, p in params.items()}
    meta_params = {name: m.detach() for name, m in meta_params.items()}
    tensors = [*params.values(), *meta_params.values()]
    with KeptBuffers(problem.modules or ()) as buffers, CommonRandomness(tensors, seed) as draws:
        place = _TestPoint(problem.with_(randomness=draws), params, meta_params, buffers, seed)
        for stream in ("inner", "outer"):
            if place.random(stream):
                found.append(
                    f"{problem.name(stream)} is random: two evaluations with the same seeds and "
                    f"arguments differ. Use torch's global generator, or draw the numbers once"
                )
        if found:  # differences of noise say nothing more
            return tuple(found)
        found += place.mismatches()
        found += place.regularizer_faults()
        if place.jumps():
            found.append(
                "The velocity jumps at the settled φ: there is a kink (|φ|, ReLU, a clamp) "
                "exactly at the solution, where no derivative exists. Smooth the loss there"
            )
    return tuple(found)


class _TestPoint:
    """A problem near a settled state, with the same buffers and random numbers in every call."""

    def __init__(
        self,
        problem: Problem,
        params: Params,
        meta_params: Params,
        buffers: KeptBuffers,
        seed: int,
    ) -> None:
        self.problem, self.settled, self.meta = problem, params, meta_params
        self.buffers = buffers
        self.generator = torch.Generator().manual_seed(seed)
        self.params = {n: p + 0.1 * d for (n, p), d in self._paired(params)}

    def value(self, stream: Stream, params: Params, meta: Params) -> Tensor:
        """The function's value on the first batch; for a map, the sum of the residual's entries."""
        self.buffers.restore(self.buffers.before)
        return self.problem.probe(stream, params, meta)

    def random(self, stream: Stream) -> bool:
        """Whether two evaluations differ by more than rounding."""
        with torch.no_grad():
            one, other = (self.value(stream, self.params, self.meta).item() for _ in range(2))
        return abs(one - other) > ROUNDING * self._eps(self.params) * max(abs(one), abs(other))

    def mismatches(self) -> Iterator[str]:
        """Derivatives by autograd that disagree with differences."""
        for stream in ("inner", "outer"):
            for argument in ("params", "meta_params"):
                if not self._confirmed(lambda p, m, s=stream: self.value(s, p, m), argument):
                    yield (
                        f"{self.problem.name(stream)} depends on {argument} by a path that "
                        f"autograd does not see, because its derivative differs from how its "
                        f"values change. Look for .detach(), .item(), .data, torch.no_grad() and "
                        f"numpy in it"
                        + (
                            "; if this is intended, the settled params are not a minimum: use "
                            "FixedPoint"
                        )
                        * (stream == "inner" and argument == "params" and self.problem.energy)
                    )

    def regularizer_faults(self) -> Iterator[str]:
        """Closed forms of a regulariser that are not the derivatives of its penalty."""
        regularizer = self.problem.regularizer
        if regularizer is None:
            return
        with torch.enable_grad():
            leaves = {n: p.clone().requires_grad_() for n, p in self.params.items()}
            grads = torch.autograd.grad(
                regularizer.penalty(leaves, self.meta),
                list(leaves.values()),
                allow_unused=True,
                materialize_grads=True,
            )
        pull = regularizer.bind(self.meta)
        with torch.no_grad():
            zero = tuple(torch.zeros_like(p) for p in self.params.values())
            velocity = pull.add_velocity(zero, self.params)
        if relative([-g for g in grads], velocity) > MISMATCH:
            yield (
                "The regulariser's velocity is not minus the derivative of its penalty with "
                "respect to φ: one of the two is wrong (by a factor or a sign, for example)"
            )
        by_theta = [self._by_theta(place) for place in (self.params, self.settled)]
        difference = [a - b for a, b in zip(*(g.values() for g in by_theta), strict=True)]
        closed = pull.contrast([self.params, self.settled], [1.0, -1.0])
        if relative(difference, [closed[name].real for name in by_theta[0]]) > MISMATCH:
            yield (
                "The regulariser's contrast is not the difference of its penalty's derivatives "
                "with respect to θ: one of the two is wrong (by a factor or a sign, for example)"
            )

    def jumps(self) -> bool:
        """Whether the velocity jumps at the settled state.

        The change of a smooth velocity across it shrinks with the distance; a jump does not.
        """
        direction = {n: d for (n, _), d in self._paired(self.settled)}
        small = self._eps(self.settled) ** (1 / 3)

        def change(distance: float) -> Tensor:
            above, below = (
                {n: p + sign * distance * direction[n] for n, p in self.settled.items()}
                for sign in (1, -1)
            )
            up, down = (flatten(list(self._velocity(p).values())).double() for p in (above, below))
            return up - down

        wide, narrow = change(16 * small), change(small)
        # entry by entry, since a norm would hide a few entries that jump
        jumped = (narrow.abs() > 0.5 * wide.abs()) & (narrow.abs() > 0.01 * wide.abs().max())
        return bool(jumped.any())

    def _confirmed(self, function: Callable[[Params, Params], Tensor], argument: str) -> bool:
        """Whether autograd's derivative along a random direction agrees with differences."""
        start = self.params if argument == "params" else self.meta
        other = self.meta if argument == "params" else self.params
        direction = {n: d for (n, _), d in self._paired(start)}

        def at(tensors: Params) -> Tensor:
            return function(*((tensors, other) if argument == "params" else (other, tensors)))

        with torch.enable_grad():
            leaves = {n: t.clone().requires_grad_() for n, t in start.items()}
            value = at(leaves)
            grads = (
                torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
                if value.requires_grad
                else [None] * len(leaves)
            )
        slope = sum(
            (g.double() * direction[n].double()).sum().item()
            for n, g in zip(leaves, grads, strict=True)
            if g is not None
        )

        def difference(step: float) -> float:
            with torch.no_grad():
                above, below = (
                    at({n: t + s * direction[n] for n, t in start.items()}).item()
                    for s in (step, -step)
                )
            return (above - below) / (2 * step)

        eps = self._eps(start)
        step = eps ** (1 / 3)
        coarse, fine = difference(step), difference(step / 2)
        noise = 2 * abs(coarse - fine) + ROUNDING * eps * abs(value.item()) / step
        return abs(fine - slope) <= MISMATCH * max(abs(fine), abs(slope)) + noise

    def _by_theta(self, params: Params) -> Params:
        regularizer = self.problem.regularizer
        assert regularizer is not None
        with torch.enable_grad():
            leaves = {n: m.clone().requires_grad_() for n, m in self.meta.items()}
            names = [n for n in leaves if n in regularizer.meta_names]
            grads = torch.autograd.grad(
                regularizer.penalty(params, leaves),
                [leaves[n] for n in names],
                allow_unused=True,
                materialize_grads=True,
            )
        return dict(zip(names, grads, strict=True))

    def _velocity(self, params: Params) -> Params:
        self.buffers.restore(self.buffers.before)
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        with torch.no_grad():
            velocity, _ = self.problem.velocity_at(self.meta, 0.0)(leaves, 0)
        return dict(zip(params, velocity, strict=True))

    def _paired(self, tensors: Params) -> Iterator[tuple[tuple[str, Tensor], Tensor]]:
        """Each tensor with a random direction on the scale of its entries."""
        for name, tensor in tensors.items():
            scale = max(tensor.double().square().mean().sqrt().item(), 0.1)
            raw = torch.randn(tensor.shape, generator=self.generator, dtype=torch.float64)
            yield (name, tensor), (scale * raw).to(tensor)

    @staticmethod
    def _eps(tensors: Params) -> float:
        return max(torch.finfo(t.dtype).eps for t in tensors.values())
