"""Pairs of nudged phases, and the answers and error estimates that follow from them."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from equigrad import vectors
from equigrad.errors import SettlingError
from equigrad.problems import Params
from equigrad.solvers import Phase, Settled

SAFETY = 2
"""The factor by which an error estimate exceeds the difference of two answers."""

TURNED = 0.4
"""Responses per unit of β that differ by a larger share belong to different solutions."""

LEAST_GAIN, MOST_GAIN = 1.25, 16.0
"""Bounds of the gain that is assumed of later levels."""


@dataclass(frozen=True)
class Pair:
    """The phases at ±β, their contrast, and measures of its errors.

    Attributes:
        beta: β.
        plus: the phase at β.
        minus: the phase at -β.
        grads: `[∂L/∂θ(φ_β, β) - ∂L/∂θ(φ_-β, -β)] / 2β`.
        left: share of the nudge that the phases, or the free phase, left unanswered.
        rounding: rounding error of φ relative to the distance between the phases.
        lopsided: relative difference between this contrast and the one of plus and free, of order
            β.
        noise: part of that difference that may come from unsettled phases and rounding.
    """

    beta: float
    plus: Settled
    minus: Settled
    grads: dict[str, Tensor]
    left: float
    rounding: float
    lopsided: float
    noise: float

    def response(self) -> list[Tensor]:
        """`(φ_β - φ_-β) / 2β`."""
        sides = ([*phase.params.values()] for phase in (self.plus, self.minus))
        return [(p - q) / (2 * self.beta) for p, q in zip(*sides, strict=True)]

    def starts(self, free: Settled, beta: float) -> tuple[Settled, Settled]:
        """The predicted ends at another ±β, by the parabola through this pair and φ_0."""
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
    """A meta-gradient, the pairs it is made of, and its estimated relative error.

    Attributes:
        error: the estimate; infinite until it is known.
        grads: the meta-gradient.
        pairs: one pair, or a coarse and a fine one.
    """

    error: float
    grads: dict[str, Tensor]
    pairs: tuple[Pair, ...]

    @classmethod
    def extrapolated(cls, coarse: Pair, fine: Pair) -> Self:
        """Richardson's extrapolation of two pairs, which removes the error of order β²."""
        gain = (coarse.beta / fine.beta) ** 2 - 1
        grads = {n: g + (g - coarse.grads[n]) / gain for n, g in fine.grads.items()}
        return cls(math.inf, grads, (coarse, fine))

    def by_error(self) -> tuple[float, bool]:
        """The key to compare answers by; of two unknown errors, one without phases is the worse."""
        return self.error, not self.pairs


@dataclass(frozen=True)
class Comparison:
    """The comparison of an answer with the next, more accurate one.

    Attributes:
        apart: `‖next - answer‖ / ‖next‖`; infinite before there are two answers.
        sides: relative difference of the two one-sided contrasts if it does not fall with β as it
            should, since the phases are on different sides of a kink or a ridge; else zero.
        gain: ratio of the previous difference of answers to this one.
        turned: whether the response is far from proportional to β, since the phases have moved to
            other solutions.
        rounding: relative rounding error of φ.
        worth: ratio of the relative error to the share of the nudge that phases leave.
    """

    apart: float = math.inf
    sides: float = 0.0
    gain: float = math.inf
    turned: bool = False
    rounding: float = 0.0
    worth: float = 1.0

    def next(self, answer: Answer, better: Answer) -> Self:
        """The comparison of the next two answers."""
        coarse, fine = better.pairs
        apart = relative(answer.grads, better.grads)
        sides = fine.lopsided - fine.noise
        falls = sides <= coarse.lopsided * (fine.beta / coarse.beta) ** 0.5
        return type(self)(
            apart,
            0.0 if falls else sides,
            self.apart / apart if apart else math.inf,
            vectors.relative(coarse.response(), fine.response()) > TURNED,
            fine.rounding,
            max(1.0, apart / coarse.left if coarse.left else 1.0),
        )

    @property
    def error(self) -> float:
        """The answer's error: the sum of all later differences, if they fall as fast as before."""
        gain = min(max(self.gain, LEAST_GAIN), MOST_GAIN)
        least = max(self.sides, 1.0 if self.turned else 0.0)
        return max(SAFETY * self.apart / (1 - 1 / gain), least) + self.rounding

    @property
    def error_of_better(self) -> float:
        """The error of the better answer, assumed to be half that of the other."""
        return max(SAFETY * self.apart / 2, self.sides) + self.rounding

    @property
    def near(self) -> bool:
        """Whether the answers converge about as fast as they should, as far as is known."""
        return not self.turned and self.gain > 2 and (self.apart < 0.5 or self.apart == math.inf)

    @property
    def lost(self) -> int:
        """1 for an answer without accuracy, 2 if its phases stay on different sides, else 0."""
        if self.error >= 1:
            return 1
        return 2 if self.apart < self.sides / 10 and self.gain < math.inf else 0


def enough(phase: Phase) -> Phase:
    """The report of a phase whose tolerance was not needed after all."""
    if phase.outcome == "converged":
        return phase
    return dataclasses.replace(phase, outcome="stopped", tol=None)


def relative(one: Params, other: Params) -> float:
    """`‖one - other‖ / ‖other‖` over all names.

    Raises:
        SettlingError: the result is not finite, although `other` is not zero.
    """
    found = vectors.relative([*one.values()], [*other.values()])
    if math.isnan(found) or (math.isinf(found) and any(t.any() for t in other.values())):
        raise SettlingError(
            "the contrast of two phases is not finite: a derivative of a loss is NaN or infinite "
            "at the params where they ended"
        )
    return found
