"""Gradients around a settled state, displacements, and what autograd does not see."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equigrad.diagnostics.own_weights import padding_rows
from equigrad.estimators import Estimator
from equigrad.evaluation import Evaluation
from equigrad.problems import Params
from equigrad.randomness import Stream
from equigrad.solvers import Settled
from equigrad.vectors import flatten

STRETCH = 8.0
"""The largest factors by which `balanced` lengthens the step in θ and shortens that in φ."""


SUSPICIOUS = 3e-3
"""Relative error of a derivative that is worth a closer look, and a word."""

ALIKE = 0.1
"""How much a mismatch may differ between two distances: that of a kink grows as they shrink."""

SLIGHT = 2e-4
"""Relative mismatch along one direction that is worth four further values.

Along most directions what is hidden shows by more, along some by far less.
"""

COARSE = 2e-2
"""The same in single precision, where many kinks lie within the shortest distance."""

GROWS = 2.0
"""By how much a mismatch may differ between two distances of which one is eight times the other."""

ROUNDING = 30.0
"""Rounding errors of a value below which a difference says nothing."""


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


def judged_slope(evaluation: Evaluation, free: Settled) -> Slope | None:
    """The outer loss where a phase ended, with its gradient, if an estimator has asked for it."""
    judged = evaluation.judged
    if judged.loss is None or judged.pressure is None or judged.at is None:
        return None
    if judged.at.params is not free.params:
        return None
    pressure, direct = judged.pressure
    return Slope(judged.loss, flat(pressure), flat(direct))


def nothing_is_hidden(
    evaluation: Evaluation,
    free: Settled,
    stream: Stream,
    slope: Slope,
    inner: Callable[[Params, Params], Tensor],
    estimator: Estimator,
) -> bool:
    """Whether a map or the outer loss changes as autograd says along a direction; notes where not.

    What is hidden on purpose (a straight-through estimator, a baseline) is named, too: the gradient
    is another one than that of what was computed.

    Args:
        evaluation: of the problem.
        free: where it settled.
        stream: the map's or the outer loss's.
        slope: its value there, with its gradient by autograd.
        inner: a number that the map gives.
        estimator: the one that is asked for its gradient.
    """
    params, meta = free.params, evaluation.meta_params
    names = evaluation.reaches.functions[stream]
    across = {
        n: t if n in names else torch.zeros_like(t) for n, t in _spread(meta, meta, 1).items()
    }
    along = _spread(params, evaluation.params, 0)
    for name, row in padding_rows(evaluation.problem.modules or ()):
        if name in along and along[name].ndim == 2:
            along[name][row] = 0  # gets no gradient by design
    move = balanced(Move(along, across), slope)
    size = flat(params).norm().item() if stream == "inner" else slope.value.abs().item()

    def value(by: Move) -> float:
        evaluation.stage.stand_at(free)
        there = {n: (p + by.params[n]).detach().requires_grad_() for n, p in params.items()}
        theta = {n: (m + by.meta[n]).detach() for n, m in meta.items()}
        if stream == "inner":
            return inner(there, theta).item()
        steps = evaluation.batch_steps("outer")
        with torch.no_grad():
            found = [evaluation.evaluate("outer", there, theta, step) for step in steps]
        return torch.stack(found).mean().item()

    share, name = unseen(value, slope, move, size), evaluation.problem.name(stream)
    if share > 0:
        evaluation.tally.note(
            f"{name} does not change as autograd predicts: along a random direction, the two "
            f"differ by {share:.1g} of their size. Something in {name} is hidden from autograd "
            f"(.detach(), .item(), torch.no_grad(), .data, numpy, a custom backward), and "
            f"{type(estimator).__name__} estimates the gradient that autograd sees. This is not "
            f"an error if it is intended, as with a straight-through estimator"
        )
    return not share > 0


def unseen(value: Callable[[Move], float], slope: Slope, move: Move, size: float) -> float:
    """The share of a slope along a direction that autograd does not see, 0 where there is none.

    Two values, and four more where they differ from the slope. What differs by another share at
    another distance is a kink that lies on the way, and what bends as much as it differs is one
    where it starts: neither is hidden.

    Args:
        value: of the function, at a displacement.
        slope: the function's value and its gradient by autograd.
        move: a direction, as long as a central difference is to be.
        size: of the numbers that a value is the sum of, for its rounding.
    """
    noise = ROUNDING * torch.finfo(slope.params.dtype).eps * size
    center, coarse = slope.value.item(), torch.finfo(slope.params.dtype).bits < 64
    found, bends, strays = [], [], []
    for scale in (1.0, STRETCH, 1 / STRETCH):
        along = move.times(scale)
        ahead, behind = value(along), value(along.times(-1.0))
        change, seen = (ahead - behind) / 2, dot(along, slope)
        whole = max(expected(along, slope), abs(change))
        apart = abs(change - seen)
        if not apart > max(SLIGHT * whole, noise * min(scale, 1.0)):  # also where NaN
            return 0.0
        found.append(apart / whole)
        bends.append(abs(ahead + behind - 2 * center) / 2)
        strays.append(apart)
    # a kink bends in proportion to the distance, and whatever is smooth to its square
    if bends[0] > ALIKE * strays[0] and bends[1] < STRETCH**1.5 * bends[0]:
        return 0.0
    least = COARSE if coarse else 0.0
    return min(found) if least < max(found) < GROWS * min(found) else 0.0


def _spread(params: Params, like: Params, seed: int) -> dict[str, Tensor]:
    """A random displacement, of every tensor in proportion to its own size."""
    generator, moves = torch.Generator().manual_seed(seed), {}
    for name, p in params.items():
        draw = torch.randn(p.shape, generator=generator).to(p)
        size = max(_rms(p), _rms(p - like[name])) if p.numel() else 0.0
        moves[name] = draw * (torch.finfo(p.dtype).eps ** (1 / 3) * (size or 1.0))
    return moves


def _rms(tensor: Tensor) -> float:
    return tensor.detach().double().square().mean().sqrt().item()
