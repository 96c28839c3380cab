"""The contrastive rule to an accuracy that is asked for."""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from equigrad.errors import SettlingError
from equigrad.estimators.estimator import Estimate
from equigrad.estimators.refinement_pairs import Answer, Comparison, Pair, enough, relative
from equigrad.evaluation import Evaluation
from equigrad.solvers import Settled, Solver
from equigrad.vectors import flatten

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

ROUNDING = 100
"""A residual of so many rounding errors of the largest one is at the floor of the dtype."""

FACTOR = 64
"""The first β is changed by at most so much at once."""

TINY = torch.finfo(torch.float64).tiny

FIRST_LOOK = 20
"""Steps until a phase is first asked whether it gets on; then twice as many, and so on."""

Obstacle = Literal["budget", "rounding", "restless", "lopsided", "apart"]


class Refinement:
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
        evaluation: evaluates and counts.
        solver: settles; its own limits give way to `rtol` and `budget`.
        rtol: relative error to reach.
        beta: the β to try first.
        budget: gradient evaluations to spend.
        keep_momentum: whether a new phase goes on with the solver's state.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        solver: Solver,
        *,
        rtol: float,
        beta: float,
        budget: int,
        keep_momentum: bool,
    ) -> None:
        self.evaluation, self.solver, self.keep_momentum = evaluation, solver, keep_momentum
        self.rtol, self.budget, self.beta = rtol, budget, abs(beta)
        dtypes = {p.dtype for p in evaluation.params.values()}
        self.dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        self.eps = torch.finfo(self.dtype).eps
        self.share = FIRST_SHARE
        self.worth = 1.0
        self.largest_force = 0.0
        self.by_force = True
        self.obstacle: Obstacle | None = None

    def run(self) -> Estimate:
        """Settle, contrast and compare until the error estimate is below `rtol`."""
        self.free = self.evaluation.settle(dataclasses.replace(self.solver, max_steps=1, tol=None))
        self.largest = self.free.phase.start_residual
        self.settle_free(self.beta)
        if self.force_size <= ROUNDING * self.eps * self.largest_force:
            self.evaluation.tally.note("∂L_out/∂φ is zero: only the direct term is left")
            error = math.inf if self.obstacle else 0.0
            return Estimate(grads=self.direct, phases=(self.free,), error_estimate=error)
        best, apart = self.refined()
        if self.obstacle == "apart" and len(self.evaluation.batch_steps("outer")) == 1:
            self.obstacle, self.by_force = None, False
            self.share, self.worth = FIRST_SHARE, 1.0
            other, apart = self.refined()
            best = min(best, other, key=Answer.by_error)
        if best.error <= self.rtol:
            cancelled = self.cancelled(best.pairs[-1])
            if cancelled > self.rtol:
                self.rounds("the contrast to no digit")
            best = dataclasses.replace(best, error=best.error + cancelled)
        if best.error > self.rtol:
            self.evaluation.tally.note(
                f"rtol={self.rtol:g} not reached, the estimated error is {best.error:.1e}: "
                f"{self.reason}" + ("; it may be zero" * (apart > 0.5 or best.error >= 1))
            )
        phases = [phase for pair in best.pairs for phase in (pair.plus, pair.minus)]
        if best.error <= self.rtol:  # however far they settled, it was enough
            phases = [dataclasses.replace(s, phase=enough(s.phase)) for s in phases]
        return Estimate(grads=best.grads, phases=(self.free, *phases), error_estimate=best.error)

    def refined(self) -> tuple[Answer, float]:
        """The first answer that is near enough, or the best, and how far the last two are apart."""
        coarse = self.first_pair()
        answer = best = Answer(math.inf, coarse.grads, (coarse,))
        seen, lost = Comparison(), 0
        while not self.obstacle:
            fine = self.next_pair(coarse, seen)
            if self.obstacle in ("budget", "restless"):  # a pair cut short proves nothing
                break
            better = Answer.extrapolated(coarse, fine)
            seen = seen.next(answer, better)
            self.worth = seen.worth
            best = min(best, dataclasses.replace(answer, error=seen.error), key=Answer.by_error)
            if seen.error <= self.rtol:
                break
            if self.obstacle == "rounding" and seen.near:  # nothing better will measure it
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
        return self.pair(beta, *coarse.starts(self.free, beta))

    def lose(self, seen: Comparison, beta: float) -> None:
        """Note that answers do not come together."""
        if self.obstacle:
            return
        self.obstacle = "lopsided" if seen.error < 2 else "apart"
        self.reason = (
            f"the phases at β and -β do not come together as β falls to {beta:.1e}: there may be a "
            f"kink or a flat direction at the solution, or a symmetry that both losses have"
        )

    def settle_free(self, beta: float) -> None:
        """Go on with the free phase until its residual is small beside the nudge."""
        while True:
            self.force, self.direct = self.evaluation.outer_gradients(self.free)
            self.force_size = flatten(list(self.force.values())).norm().item()
            self.largest_force = max(self.force_size, self.largest_force)
            tol = max(self.tol(beta) / AHEAD, self.floor)
            reached = self.free.phase.residual <= tol and self.free.phase.outcome == "converged"
            if reached or self.obstacle:
                break
            self.free = self.settle(self.free, 0.0, tol)

    def first_pair(self) -> Pair:
        """A pair at a β whose response bends the outer force by about a tenth."""
        beta, start = self.beta, self.free
        lowered, hopeless = False, self.obstacle is not None
        while True:
            bend = math.inf
            last = hopeless or beta < self.eps**2 * self.beta
            try:
                plus = self.settle(start, beta, self.tol(beta))
                bend = self.bend(plus)
                coarse = self.tol(beta) < self.floor or self.rounding(plus, self.free) > self.share
                if coarse and bend < BEND / 4 and not (lowered or last or self.spent):
                    self.obstacle = None
                    beta *= min(FACTOR, BEND / max(bend, TINY))
                    continue
                if bend <= 2 * BEND or self.spent or last:
                    mirrored = {n: 2 * p - plus.params[n] for n, p in self.free.params.items()}
                    start = dataclasses.replace(plus, params=mirrored)
                    # against the force there may be no equilibrium near
                    limit = 4 * plus.phase.steps + 100
                    minus = self.settle(start, -beta, self.tol(beta), limit)
                    bend = self.bend(minus)
                    if bend <= 4 * BEND or self.spent or last:
                        pair = self.pair(beta, plus, minus)
                        if self.obstacle != "restless" or self.spent or last:
                            return pair
                        bend = math.inf
            except SettlingError:
                if last:
                    raise
            lowered, self.obstacle = True, None
            beta *= max(1 / FACTOR, 0.5 * min(1.0, BEND / max(bend, TINY)))
            self.settle_free(beta)
            start = self.free

    @property
    def floor(self) -> float:
        """The residual that rounding may leave; positive."""
        return max(ROUNDING * self.eps * self.largest, TINY)

    def bend(self, phase: Settled) -> float:
        """How much the outer force has changed since the free phase, relative to itself."""
        force, _ = self.evaluation.outer_gradients(phase)
        return relative(force, self.force)

    def tol(self, beta: float) -> float:
        """The residual that a phase at β may leave."""
        return max(self.share * beta * self.force_size, TINY)

    def pair(self, beta: float, plus: Settled, minus: Settled) -> Pair:
        """Settle the phases at ±β until the share of the nudge that is left is small enough."""
        self.settle_free(beta)
        plus = self.settle(plus, beta, self.tol(beta))
        minus = self.settle(minus, -beta, self.tol(beta))
        grads = self.contrast(plus, minus, 2 * beta)
        rounding = self.rounding(plus, minus)
        if rounding == math.inf:
            self.obstacle = "restless"
            self.reason = f"the phases at β = ±{beta:.1e} did not react to the nudge"
        elif rounding > self.share:
            self.rounds(f"the answer to β = {beta:.1e} to a share of {rounding:.1e}")
        left = max(s.phase.residual for s in (plus, minus, self.free)) / (beta * self.force_size)
        one_sided = self.contrast(plus, self.free, beta)
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

    def contrast(self, one: Settled, other: Settled, apart: float) -> dict[str, Tensor]:
        """The contrast of two phases whose nudges differ by `apart`."""
        return self.evaluation.contrast([one, other], [1 / apart, -1 / apart], self.direct)

    def rounding(self, plus: Settled, minus: Settled) -> float:
        """What rounding φ is worth beside the distance between the phases."""
        one, other = flatten(list(plus.params.values())), flatten(list(minus.params.values()))
        moved = (one - other).norm().item()
        return self.eps * one.norm().item() / moved if moved else math.inf

    def cancelled(self, pair: Pair) -> float:
        """What rounding is worth where the contrast is small beside those of other directions.

        One of them is the response with its elements in reverse order.
        """
        other = {}
        for name, plus in pair.plus.params.items():
            response = plus - pair.minus.params[name]
            other[name] = self.free.params[name] + response.flatten().flip(0).view_as(plus)
        moved = self.contrast(
            dataclasses.replace(pair.plus, params=other), self.free, 2 * pair.beta
        )
        grads, direct = (flatten(list(g.values())).double() for g in (pair.grads, self.direct))
        usual = (flatten(list(moved.values())).double() - direct).norm() + direct.norm()
        return (ROUNDING * self.eps * usual / grads.norm()).item() if usual else 0.0

    def rounds(self, what: str) -> None:
        """Note that rounding stands in the way."""
        self.obstacle = "rounding"
        self.reason = f"{self.dtype} resolves {what} here"
        if self.dtype != torch.float64:
            self.reason += "; use torch.float64"

    @property
    def spent(self) -> bool:
        """Whether the budget is spent."""
        return self.evaluation.tally.gradient_evaluations >= self.budget

    def settle(self, state: Settled, beta: float, tol: float, limit: int | None = None) -> Settled:
        """Go on with a phase, or start one at a state, until its residual is at most `tol`.

        Gives up where the residual does not get smaller, and says why in `obstacle`; or after as
        many steps as `limit` says.
        """
        begun = state.phase if state.phase.beta == beta else None
        keep, chunk = self.keep_momentum or begun is not None, FIRST_LOOK
        before = math.inf
        while True:
            room = self.budget - self.evaluation.tally.gradient_evaluations
            # a step with a line search takes several gradients
            most = max(1, min(chunk, room // 20, limit or chunk))
            solver = dataclasses.replace(self.solver, tol=tol, max_steps=most)
            state = self.evaluation.settle_nudged(
                state,
                solver,
                beta,
                keep_momentum=keep,
                share=1.0,
                force=self.force if self.by_force and beta != 0 else None,
            )
            phase = state.phase
            if begun is not None:
                phase = dataclasses.replace(
                    phase,
                    steps=begun.steps + phase.steps,
                    start_residual=begun.start_residual,
                )
                state = dataclasses.replace(state, phase=phase)
            if phase.outcome == "converged" or (limit is not None and phase.steps >= limit):
                return state
            stuck = phase.outcome == "stalled" or (
                most > 8 * FIRST_LOOK and phase.residual >= before
            )
            slow = most >= FIRST_LOOK and phase.residual > 0.7 * before
            at_floor = phase.residual <= self.floor
            if self.spent:
                self.obstacle = "budget"
                self.reason = (
                    f"the budget of {self.budget} gradient evaluations is spent; raise budget, or "
                    f"settle with a faster solver"
                )
            elif at_floor and (stuck or slow):
                self.rounds(f"residuals to {phase.residual:.1e}")
            elif stuck:
                self.obstacle = "restless"
                self.reason = (
                    f"the phase with β = {beta:.2g} does not settle ({phase}): there may be no "
                    f"equilibrium near, or the solver's step size is too large"
                )
            if self.obstacle:
                return state
            begun, before, keep, chunk = phase, phase.residual, True, 2 * chunk
