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

DRAWS = 5
"""Directions along which something has to be hidden, or too small to see, in single precision."""

NOISE = 3.0
"""Rounding errors of a difference that is compared with another one."""

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
    of_loss = stream == "inner" and evaluation.problem.symmetric

    def move(draw: int) -> Move:
        drawn = _spread(meta, meta, 2 * draw + 1)
        across = {n: t if n in names else torch.zeros_like(t) for n, t in drawn.items()}
        along = _spread(params, evaluation.params, 2 * draw)
        if of_loss:  # has no slope in φ at rest
            along = {n: torch.zeros_like(p) for n, p in params.items()}
        for name, row in padding_rows(evaluation.problem.modules or ()):
            if name in along and along[name].ndim == 2:
                along[name][row] = 0  # gets no gradient by design
        # θ alone changes a loss little, and smoothly: differences in single precision are longer
        stretch = STRETCH if of_loss and coarse(slope) else 1.0
        return balanced(Move(along, across), slope).times(stretch)

    of_map = stream == "inner" and not evaluation.problem.energy
    size = flat(params).norm().item() if of_map else slope.value.abs().item()

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

    share, name = unseen(value, slope, move(0), size), evaluation.problem.name(stream)
    if share > 0 and coarse(slope):  # many kinks may look alike at two distances by chance
        others = [unseen(value, slope, move(draw), size) for draw in range(1, DRAWS)]
        named, kinks = sum(o > 0 for o in others), sum(map(math.isnan, others))
        share = share if named > 2 * kinks else 0.0
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
    """The share of a slope along a direction that autograd does not see.

    Two values, and four more where they differ from the slope. What differs by another share at
    another distance is a kink that lies on the way, and what bends as much as it differs is one
    where it starts: neither is hidden. In single precision the longest of three distances shows
    what is smooth as well, and the two shorter ones have to agree more closely.

    Args:
        value: of the function, at a displacement.
        slope: the function's value and its gradient by autograd.
        move: a direction, as long as a central difference is to be.
        size: of the numbers that a value is the sum of, for its rounding.

    Returns:
        The share, 0 where there is none, or NaN if it depends on the distance.
    """
    eps, center = torch.finfo(slope.params.dtype).eps, slope.value.item()
    found, bends, strays = [], [], []
    for scale in (1.0, 1 / STRETCH, STRETCH):
        along = move.times(scale)
        ahead, behind = value(along), value(along.times(-1.0))
        change, seen = (ahead - behind) / 2, dot(along, slope)
        whole = max(expected(along, slope), abs(change))
        apart, noise = change - seen, ROUNDING * eps * size * min(scale, 1.0)
        if not abs(apart) > max(SLIGHT * whole, noise) and not (coarse(slope) and scale > 1):
            return 0.0  # also where NaN
        found.append(apart / whole)
        bends.append(abs(ahead + behind - 2 * center) / 2)
        strays.append(abs(apart))
    # a kink bends in proportion to the distance, and whatever is smooth to its square
    for one, more in ((0, 2), (1, 0)):
        bent = bends[one] > ALIKE * strays[one] + (NOISE * eps * size if one else 0.0)
        if bent and bends[more] < STRETCH**1.5 * bends[one]:
            return math.nan
    middle, near, _ = found
    if coarse(slope):
        rounding = NOISE * eps * size * abs(near) / strays[1]
        alike = abs(middle - near) < ALIKE * abs(near) + rounding
    else:
        alike = max(map(abs, found)) < GROWS * min(map(abs, found))
    return min(abs(middle), abs(near)) if alike else math.nan


def coarse(slope: Slope) -> bool:
    """Whether a slope has single precision: many kinks lie within the shortest distance then."""
    return torch.finfo(slope.params.dtype).bits < 64


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
