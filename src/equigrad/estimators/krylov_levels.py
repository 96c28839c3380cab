"""The response of a learner at rest, by conjugate gradients from contrasts, level after level."""

import dataclasses
import math
from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from equigrad.estimators.contrast_products import ContrastProducts
from equigrad.estimators.refinement_pairs import Answer, Comparison, Pair, relative
from equigrad.estimators.refinement_phases import RefinedPhases
from equigrad.solvers import Phase
from equigrad.solvers.lbfgs import Memory
from equigrad.vectors import flatten, unflatten

FIRST_SHARE = 2e-3
"""The share of the outer force that the response of the first level may leave."""

GAIN = 10
"""How much further a level goes than the one before."""

AHEAD = 8
"""How much further the free phase is settled than the response."""

FAR = 4
"""So many times what the free phase moved in the last level, it may still be away from rest."""

NEARER = 4
"""The free phase is so many times nearer to rest than a level before, or at the floor."""

PATIENCE = 50
"""Iterations in a row that may bring nothing: the products are no more accurate than that."""


class KrylovLevels:
    r"""Contrasts of a learner at rest and slightly nudged, by Krylov steps instead of its own.

    At a settled φ the response to a small nudge solves a linear system,

        H x = -∂L_out/∂φ,    ∇̂_θ = ∂L_out/∂θ + [∂L_in/∂θ(φ + βx) - ∂L_in/∂θ(φ - βx)] / 2β,

    and a difference of two gradients near φ is a product with H: conjugate gradients need no second
    derivative. A product takes one gradient, since that at φ is known; where that is not accurate
    enough, in narrow formats and at late levels, one on each side. What an `LBFGS` has learned of
    the curvature preconditions them, and what they meet on the way is handed back to it.

    **Levels.** Each settles the free phase and the response ten times as far as the one before, and
    takes its differences on the other side of φ and half as near, so that the error of a difference
    shows as well. The error of an answer is measured by the next, which is not returned: its own is
    not known. Nothing but the end depends on the error asked for, so that a stricter one is no
    worse.

    Before an answer is believed, the curvature has to be the same on both sides of φ, as far as the
    free phase may still be from rest, and rounding small in other directions, too.

    Args:
        phases: settles the free phase, and knows what stands in the way.
    """

    def __init__(self, phases: RefinedPhases) -> None:
        self.phases = phases
        self._response: Tensor | None = None
        self._products: ContrastProducts | None = None
        self._moved = 0.0

    def refined(self) -> tuple[Answer, float]:
        """The first answer that is near enough, or the best, and how far the last two are apart."""
        phases, seen, level = self.phases, Comparison(), 0
        answer = best = Answer(math.inf, phases.direct, ())
        while self._settled(level) and (pair := self._pair(level)) is not None:
            better = Answer(math.inf, pair.grads, (pair,))
            if level:
                apart = relative(answer.grads, better.grads)
                gain = seen.apart / apart if apart else math.inf
                seen = Comparison(apart, gain=gain, rounding=pair.rounding + pair.left)
                answer = dataclasses.replace(answer, error=seen.error)
                if answer.error <= phases.rtol:
                    answer = phases.doubted(answer, pair)
                    if phases.obstacle:
                        return answer, apart
                    answer = dataclasses.replace(answer, error=max(answer.error, self._kink()))
                best = min(best, answer, key=Answer.by_error)
                if best.error <= phases.rtol:
                    break
            answer, level = better, level + 1
        return best, seen.apart

    def _settled(self, level: int) -> bool:
        """Settle the free phase for a level; whether it is now much nearer to rest than before.

        There is none beyond what the best of differences resolve.
        """
        phases, share = self.phases, FIRST_SHARE / GAIN**level / AHEAD
        if share * AHEAD < phases.eps ** (2 / 3):
            return False
        most = phases.free.phase.residual / NEARER if level else math.inf
        phases.settle_free(min(share, most / phases.force_size))
        return phases.free.phase.residual <= max(most, phases.floor) and not phases.obstacle

    def _pair(self, level: int) -> Pair | None:
        """φ ± βx; None where conjugate gradients cannot find x."""
        phases = self.phases
        products = self._begin_products(level)
        if self._products is not None:
            steps = torch._foreach_sub(products.leaves, self._products.leaves)
            self._moved = flatten(list(steps)).norm().item()
        share = FIRST_SHARE / GAIN**level
        solved = self._solve(products, share)
        if solved is None:
            return None
        response, unsolved, iterations = solved
        self._response, self._products = response, products
        beta = 2.0 ** (2 - level) * phases.eps ** (1 / 3) * products.scale / response.norm().item()
        start = beta * phases.force_size
        ends = []
        for side in (beta, -beta):
            moves = unflatten(side * response, products.leaves)
            params = torch._foreach_add(products.leaves, moves)
            phase = Phase(side, iterations, start, unsolved * start, "converged", share * start)
            named = dict(zip(products.params, params, strict=True))
            ends.append(dataclasses.replace(phases.free, params=named, phase=phase))
        plus, minus = ends
        grads = phases.contrast(plus, minus, 2 * beta)
        rounding = phases.rounding(plus, minus)
        return Pair(beta, plus, minus, grads, unsolved, rounding, lopsided=0.0, noise=0.0)

    def _begin_products(self, level: int) -> ContrastProducts:
        """Products where the free phase is now, on the other side and half as near as before."""
        eps = self.phases.eps
        near = 64 * eps**0.5
        forward = near < FIRST_SHARE / GAIN**level
        share = (-0.5) ** level * (near if forward else 2 * eps ** (1 / 3))
        return ContrastProducts(
            self.phases.evaluation, self.phases.free, share=share, forward=forward
        )

    def _kink(self) -> float:
        """By what the curvature differs on both sides of where the learner may rest; 0 if smooth.

        On both sides of a smooth point it differs in proportion to the distance.
        """
        assert self._products is not None
        assert self._response is not None
        far = self._products.uneven(self._response, FAR * self._moved)
        if far <= self.phases.rtol:
            return 0.0
        near = self._products.uneven(self._response, self._moved)
        return near if near > far / FAR**0.5 else 0.0

    def _solve(self, products: ContrastProducts, share: float) -> tuple[Tensor, float, int] | None:
        """Preconditioned conjugate gradients from the response of the level before.

        Returns:
            The response, the share of the force that it leaves, and iterations; None where a
            curvature is not positive, or iterations bring nothing more.
        """
        force = flatten(list(self.phases.force.values()))
        x, residual = self._response, -force
        if x is None:
            x = torch.zeros_like(force)
        else:
            residual = residual - products.product(x)
        memory = self._memory(force)
        scaled = direction = _preconditioned(memory, residual)
        power, whole = residual.dot(scaled), force.dot(_preconditioned(memory, force))
        met: deque[tuple[Tensor, Tensor]] = deque(maxlen=0 if memory is None else memory.history)

        def unsolved() -> float:
            return max(power / whole, (residual.norm() / force.norm()) ** 2).item() ** 0.5

        left, least, idle, iterations = unsolved(), math.inf, 0, 0
        # to measure what the level before has left, go well beyond that
        share = min(share, max(left / NEARER, products.error))
        while left > share:
            least, idle = (left, 0) if left < 0.9 * least else (least, idle + 1)
            image = products.product(direction)
            curvature = direction.dot(image)
            if not curvature > 0 or idle > PATIENCE or self.phases.spent:
                return None
            stride = power / curvature
            x, residual = x + stride * direction, residual - stride * image
            met.append((direction, image))
            scaled = _preconditioned(memory, residual)
            power, before = residual.dot(scaled), power
            direction = scaled + (power / before) * direction
            left, iterations = unsolved(), iterations + 1
        self._hand_back(memory, met)
        return x, left, iterations

    def _memory(self, like: Tensor) -> Memory | None:
        """What the free phase has learned of the curvature, if its solver learns anything."""
        state = self.phases.free.solver_state
        if not isinstance(state, Memory) or not self.phases.keep_momentum:
            return None
        return Memory(state.history, like, state)

    def _hand_back(self, memory: Memory | None, met: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Let the free phase go on with the curvature along the directions that were met."""
        if memory is None:
            return
        for direction, image in met:
            memory.remember(direction, image)
        self.phases.free = dataclasses.replace(self.phases.free, solver_state=memory)


def _preconditioned(memory: Memory | None, vector: Tensor) -> Tensor:
    """An approximate `H⁻¹ vector`; the vector itself where nothing is known of H."""
    return vector if memory is None else -memory.direction(vector)
