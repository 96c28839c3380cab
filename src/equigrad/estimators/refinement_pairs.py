"""What the contrastive rule to an accuracy is made of: pairs of phases, and answers."""

import dataclasses
import math
from dataclasses import dataclass

from torch import Tensor

from equigrad import vectors
from equigrad.errors import SettlingError
from equigrad.problems import Params
from equigrad.solvers import Phase, Settled


@dataclass(frozen=True)
class Pair:
    """The phases at ±β, their contrast, and what is wrong with it.

    Attributes:
        beta: β.
        plus: the phase at β.
        minus: the phase at -β.
        grads: `[∂L/∂θ(φ_β, β) - ∂L/∂θ(φ_-β, -β)] / 2β`.
        left: the share of the nudge that the phases, or the free one, left unanswered.
        rounding: what rounding φ is worth beside the distance between the phases.
        lopsided: relative difference of the contrast with the free phase to this one, of order β.
    """

    beta: float
    plus: Settled
    minus: Settled
    grads: dict[str, Tensor]
    left: float
    rounding: float
    lopsided: float

    def starts(self, free: Settled, beta: float) -> tuple[Settled, Settled]:
        """Where the phases at another ±β should end, by the parabola through this pair and φ_0."""
        ratio = beta / self.beta
        plus, minus = dict(free.params), dict(free.params)
        for name, center in free.params.items():
            up, down = self.plus.params[name] - center, self.minus.params[name] - center
            even, odd = 0.5 * ratio**2 * (up + down), 0.5 * ratio * (up - down)
            plus[name], minus[name] = center + even + odd, center + even - odd
        return (
            dataclasses.replace(self.plus, params=plus),
            dataclasses.replace(self.minus, params=minus),
        )


@dataclass(frozen=True)
class Answer:
    """A meta-gradient, the pairs it is made of, and its estimated relative error."""

    error: float
    grads: dict[str, Tensor]
    pairs: tuple[Pair, ...]


def extrapolated(coarse: Pair, fine: Pair) -> Answer:
    """Take the error of order β² out of two pairs; its own error is not known yet."""
    gain = (coarse.beta / fine.beta) ** 2 - 1
    grads = {n: g + (g - coarse.grads[n]) / gain for n, g in fine.grads.items()}
    return Answer(math.inf, grads, (coarse, fine))


def enough(phase: Phase) -> Phase:
    """The report of a phase whose tolerance turned out not to be needed."""
    if phase.outcome == "converged":
        return phase
    return dataclasses.replace(phase, outcome="stopped", tol=None)


def relative(one: Params, other: Params) -> float:
    """`‖one - other‖ / ‖other‖` over all names.

    Raises:
        SettlingError: it is not finite, though `other` is not zero.
    """
    found = vectors.relative([*one.values()], [*other.values()])
    if math.isnan(found) or (math.isinf(found) and any(t.any() for t in other.values())):
        raise SettlingError(
            "the contrast of two phases is not finite: a derivative of a loss is NaN or infinite "
            "where they settled"
        )
    return found
