"""Pairs of nudged phases that the learner settles by its own steps, level after level."""

import dataclasses
import math

from equigrad.errors import SettlingError
from equigrad.estimators.refinement_pairs import Answer, Comparison, Pair, relative
from equigrad.estimators.refinement_phases import TINY, RefinedPhases
from equigrad.solvers import Settled

RATIO = 2
"""Between the β of a level and that of the next."""

FAR = 8
"""The same, where answers do not come together as fast as they should."""

GAIN = 16
"""How much more accurate a level is than the one before: RATIO⁴."""

FIRST_SHARE = 2e-2
"""The share of the nudge that the phases of the first level may leave unanswered."""

BEND = 0.1
"""How much the response to the first β may change the outer force, relative to itself."""

AHEAD = 8
"""How much further the free phase is settled than the nudged ones."""

MOST_NOISE = 0.05
"""One-sided contrasts that differ by more than this do not do so by noise."""

PATIENCE = 4
"""Levels in a row without any accuracy, before it is taken that the next ones will be, too."""

FACTOR = 64
"""The first β is changed by at most so much at once."""


class StepLevels:
    r"""Symmetric differences, refined until their own error estimate is below a tolerance.

    Phases are nudged by the force that the outer loss exerts on the free solution,

        L_in(φ, θ) + β ∂L_out/∂φ(φ_0)·φ,    ∇̂_θ = ∂L_out/∂θ(φ_0)
                                            + [∂L_in/∂θ(φ_β) - ∂L_in/∂θ(φ_-β)] / 2β,

    which has the same derivative at β = 0 as a nudge by the outer loss itself, costs one gradient a
    step instead of two, is exact for any β where the inner loss is quadratic, and is bounded for β
    of both signs where the inner loss is strongly convex.

    **Levels.** Each level halves β, and settles its phases until a sixteenth of the share of the
    nudge is left that the level before left. With two levels the error of order β² is taken out
    (Richardson), so that both errors of Theorem 2 (Zucchet et al.), that of finite β and that of
    unsettled phases, fall sixteen times a level. Where answers come together more slowly, β falls
    eight times. The force is taken anew at each level, from a free phase that is settled on, too.

    **The error** of an answer is measured by the next: it is what the two differ by, since the next
    is so much more accurate. The answer that was measured is returned, not the one that measured
    it, whose own error is not known. Where the phases at β and -β stand on the two sides of a kink,
    their contrasts with the free phase do not come together as β falls, and their difference is
    taken for the error.

    **A stricter tolerance** goes on along the same way: nothing but the end of it depends on
    `rtol`. Its answer is thus no worse than that of a looser one.

    The first β is the one at which the response changes the force by about a tenth of itself,
    however the losses are scaled. Later phases start where the parabola through the earlier ones
    says that they will end. Where no answer comes near another for several levels, which a symmetry
    of both losses causes (a constant force turns the solution along it), phases are nudged by the
    outer loss itself.

    Args:
        phases: settles the phases, and knows what stands in the way.
        beta: the β to try first.
    """

    def __init__(self, phases: RefinedPhases, beta: float) -> None:
        self.phases, self.beta = phases, abs(beta)
        self.share = FIRST_SHARE
        self.worth = 1.0

    def refined(self) -> tuple[Answer, float]:
        """The first answer that is near enough, or the best, and how far the last two are apart."""
        coarse = self.first_pair()
        answer = best = Answer(math.inf, coarse.grads, (coarse,))
        seen, lost = Comparison(), 0
        while not self.phases.obstacle:
            fine = self.next_pair(coarse, seen)
            if self.phases.obstacle in ("budget", "restless"):  # a pair cut short proves nothing
                break
            better = Answer.extrapolated(coarse, fine)
            seen = seen.next(answer, better)
            self.worth = seen.worth
            best = min(best, dataclasses.replace(answer, error=seen.error), key=Answer.by_error)
            if seen.error <= self.phases.rtol:
                break
            if self.phases.obstacle == "rounding" and seen.near:  # nothing better will measure it
                last = dataclasses.replace(better, error=seen.error_of_better)
                best = min(best, last, key=Answer.by_error)
            lost = lost + seen.lost if seen.lost else 0
            if lost >= PATIENCE:
                self.lose(seen, fine.beta)
            coarse, answer = fine, better
        return best, seen.apart

    def next_pair(self, coarse: Pair, seen: Comparison) -> Pair:
        """The pair of the next level."""
        if seen.apart < math.inf:
            # to settle much further than β is small brings nothing
            self.share = min(self.share, max(self.share / GAIN, seen.apart / GAIN**3))
        else:
            self.share /= GAIN
        beta = coarse.beta / (RATIO if seen.near else FAR)
        return self.pair(beta, *coarse.starts(self.phases.free, beta))

    def lose(self, seen: Comparison, beta: float) -> None:
        """Note that answers do not come together."""
        if self.phases.obstacle:
            return
        self.phases.obstacle = "lopsided" if seen.error < 2 else "apart"
        self.phases.reason = (
            f"the phases at β and -β do not approach each other as β decreases to {beta:.1e}: "
            f"there may be a kink or a flat direction at the solution, or a common symmetry of "
            f"both losses"
        )

    def first_pair(self) -> Pair:
        """A pair at a β whose response bends the outer force by about a tenth."""
        beta, start = self.beta, self.phases.free
        lowered, hopeless = False, self.phases.obstacle is not None
        while True:
            bend = math.inf
            last = hopeless or beta < self.phases.eps**2 * self.beta
            try:
                plus = self.phases.settle(start, beta, self.tol(beta))
                bend = self.bend(plus)
                coarse = (
                    self.tol(beta) < self.phases.floor
                    or self.phases.rounding(plus, self.phases.free) > self.share
                )
                if coarse and bend < BEND / 4 and not (lowered or last or self.phases.spent):
                    self.phases.obstacle = None
                    beta *= min(FACTOR, BEND / max(bend, TINY))
                    continue
                if bend <= 2 * BEND or self.phases.spent or last:
                    mirrored = {
                        n: 2 * p - plus.params[n] for n, p in self.phases.free.params.items()
                    }
                    start = dataclasses.replace(plus, params=mirrored)
                    # against the force there may be no equilibrium near
                    limit = 4 * plus.phase.steps + 100
                    minus = self.phases.settle(start, -beta, self.tol(beta), limit)
                    bend = self.bend(minus)
                    if bend <= 4 * BEND or self.phases.spent or last:
                        pair = self.pair(beta, plus, minus)
                        if self.phases.obstacle != "restless" or self.phases.spent or last:
                            return pair
                        bend = math.inf
            except SettlingError:
                if last:
                    raise
            lowered, self.phases.obstacle = True, None
            beta *= max(1 / FACTOR, 0.5 * min(1.0, BEND / max(bend, TINY)))
            self.phases.settle_free(self.share * beta / AHEAD)
            start = self.phases.free

    def bend(self, phase: Settled) -> float:
        """How much the outer force has changed since the free phase, relative to itself."""
        force, _ = self.phases.evaluation.outer_gradients(phase)
        return relative(force, self.phases.force)

    def tol(self, beta: float) -> float:
        """The residual that a phase at β may leave."""
        return max(self.share * beta * self.phases.force_size, TINY)

    def pair(self, beta: float, plus: Settled, minus: Settled) -> Pair:
        """Settle the phases at ±β until the share of the nudge that is left is small enough."""
        self.phases.settle_free(self.share * beta / AHEAD)
        plus = self.phases.settle(plus, beta, self.tol(beta))
        minus = self.phases.settle(minus, -beta, self.tol(beta))
        grads = self.phases.contrast(plus, minus, 2 * beta)
        rounding = self.phases.rounding(plus, minus)
        if rounding == math.inf:
            self.phases.obstacle = "restless"
            self.phases.reason = f"the phases at β = ±{beta:.1e} did not respond to the nudge"
        elif rounding > self.share:
            self.phases.rounds(
                f"the response to β = {beta:.1e} has a relative rounding error of {rounding:.1e}"
            )
        left = max(s.phase.residual for s in (plus, minus, self.phases.free)) / (
            beta * self.phases.force_size
        )
        one_sided = self.phases.contrast(plus, self.phases.free, beta)
        return Pair(
            beta,
            plus,
            minus,
            grads,
            left,
            rounding,
            lopsided=relative(one_sided, grads),
            noise=min(4 * (self.worth * left + rounding), MOST_NOISE),
        )
