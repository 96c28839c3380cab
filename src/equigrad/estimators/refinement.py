"""The contrastive rule to a requested accuracy."""

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
"""Ratio between the β of a level and that of the next."""

FAR = 8
"""The same ratio, if the answers converge more slowly than they should."""

GAIN = 16
"""Gain in accuracy from one level to the next: RATIO⁴."""

FIRST_SHARE = 2e-2
"""The share of the nudge that the phases of the first level may leave unanswered."""

BEND = 0.1
"""Relative change of the outer force that the response to the first β aims at."""

AHEAD = 8
"""Factor by which the tolerance of the free phase is stricter than that of the nudged ones."""

MOST_NOISE = 0.05
"""One-sided contrasts that differ by more than this do not differ by noise alone."""

PATIENCE = 4
"""Number of successive levels without any accuracy after which refinement gives up."""

ROUNDING = 100
"""A residual of this many rounding errors of the largest one is at the limit of the dtype."""

FACTOR = 64
"""The largest factor by which one attempt changes the first β."""

TINY = torch.finfo(torch.float64).tiny

FIRST_LOOK = 20
"""Steps before the progress of a phase is first checked; this doubles with each check."""

Obstacle = Literal["budget", "rounding", "restless", "lopsided", "apart"]


class Refinement:
    r"""Symmetric differences, refined until their own error estimate is below a tolerance.

    Phases are nudged by the force that the outer loss exerts on the free solution,

        L_in(φ, θ) + β ∂L_out/∂φ(φ_0)·φ,    ∇̂_θ = ∂L_out/∂θ(φ_0)
                                            + [∂L_in/∂θ(φ_β) - ∂L_in/∂θ(φ_-β)] / 2β,

    which has the same derivative at β = 0 as a nudge by the outer loss itself, costs one gradient
    in each step instead of two, is exact for any β if the inner loss is quadratic, and is bounded
    for β of both signs if the inner loss is strongly convex.

    **Levels.** Each level halves β, and settles its phases until the share of the nudge that is
    left unanswered is a sixteenth of that of the level before. Richardson extrapolation from two
    levels removes the error of order β², so that both errors of Theorem 2 (Zucchet et al.), from
    finite β and from unsettled phases, fall by a factor of sixteen in each level. If the answers
    converge more slowly, β falls by a factor of eight. The free phase is settled further at each
    level as well, and the force computed again.

    **The error** of an answer is its difference to the next answer, which is much more accurate.
    The answer whose error was measured in this way is returned, and not the next one, whose own
    error is unknown. If the phases at β and -β are on different sides of a kink, their contrasts
    with the free phase do not converge to each other as β falls, and their difference is taken to
    be the error.

    **A stricter tolerance** repeats the levels of a looser one and adds further ones: only the end
    depends on `rtol`. Its answer is therefore no worse.

    The first β is chosen so that the response changes the force by about a tenth, for any scale of
    the losses. Later phases start at an extrapolation of earlier ones by a parabola in β. If the
    answers do not converge for several levels, as with a symmetry of both losses (a constant force
    turns the solution along it), phases are nudged by the outer loss itself.

    Args:
        evaluation: runs the phases and counts gradients.
        solver: solver of the phases; `rtol` and `budget` replace its own limits.
        rtol: relative error to reach.
        beta: the first β to try.
        budget: gradient evaluations to spend.
        keep_momentum: whether a new phase continues with the solver's state.
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
        # a second attempt, nudged by the outer loss, for symmetries that a constant force breaks;
        # several outer batches would make its nudge change from step to step
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
        if best.error <= self.rtol:  # the phases have settled far enough, whatever their tolerance
            phases = [dataclasses.replace(s, phase=enough(s.phase)) for s in phases]
        return Estimate(grads=best.grads, phases=(self.free, *phases), error_estimate=best.error)

    def refined(self) -> tuple[Answer, float]:
        """The first answer that is accurate enough, or the best, with the last two's difference."""
        coarse = self.first_pair()
        answer = best = Answer(math.inf, coarse.grads, (coarse,))
        seen, lost = Comparison(), 0
        while not self.obstacle:
            fine = self.next_pair(coarse, seen)
            if self.obstacle in ("budget", "restless"):  # an unfinished pair measures no error
                break
            better = Answer.extrapolated(coarse, fine)
            seen = seen.next(answer, better)
            self.worth = seen.worth
            best = min(best, dataclasses.replace(answer, error=seen.error), key=Answer.by_error)
            if seen.error <= self.rtol:
                break
            # rounding allows no better answer to measure this one's error, so it is extrapolated
            if self.obstacle == "rounding" and seen.near:
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
            # settling beyond the error of finite β would not improve the answer
            self.share = min(self.share, max(self.share / GAIN, seen.apart / GAIN**3))
        else:
            self.share /= GAIN
        beta = coarse.beta / (RATIO if seen.near else FAR)
        return self.pair(beta, *coarse.starts(self.free, beta))

    def lose(self, seen: Comparison, beta: float) -> None:
        """Record as the obstacle that the answers do not converge."""
        if self.obstacle:
            return
        self.obstacle = "lopsided" if seen.error < 2 else "apart"
        self.reason = (
            f"the phases at β and -β do not come together as β falls to {beta:.1e}: there may be a "
            f"kink or a flat direction at the solution, or a symmetry that both losses have"
        )

    def settle_free(self, beta: float) -> None:
        """Continue the free phase until its residual is small compared with the nudge."""
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
        """The pair at the first β, chosen so that the outer force changes by about a tenth."""
        beta, start = self.beta, self.free
        lowered, hopeless = False, self.obstacle is not None
        while True:
            bend = math.inf
            last = hopeless or beta < self.eps**2 * self.beta
            try:
                plus = self.settle(start, beta, self.tol(beta))
                bend = self.bend(plus)
                # raise β if rounding limits the contrast while the response is still linear
                coarse = self.tol(beta) < self.floor or self.rounding(plus, self.free) > self.share
                if coarse and bend < BEND / 4 and not (lowered or last or self.spent):
                    self.obstacle = None
                    beta *= min(FACTOR, BEND / max(bend, TINY))
                    continue
                if bend <= 2 * BEND or self.spent or last:
                    mirrored = {n: 2 * p - plus.params[n] for n, p in self.free.params.items()}
                    start = dataclasses.replace(plus, params=mirrored)
                    # at -β, there may be no equilibrium nearby: limit the attempt
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
            # the response is too large or does not settle: try again with a smaller β
            lowered, self.obstacle = True, None
            beta *= max(1 / FACTOR, 0.5 * min(1.0, BEND / max(bend, TINY)))
            self.settle_free(beta)
            start = self.free

    @property
    def floor(self) -> float:
        """The residual, above zero, that rounding may leave."""
        return max(ROUNDING * self.eps * self.largest, TINY)

    def bend(self, phase: Settled) -> float:
        """The change of the outer force since the free phase, relative to its size."""
        force, _ = self.evaluation.outer_gradients(phase)
        return relative(force, self.force)

    def tol(self, beta: float) -> float:
        """The residual at which a phase at β has settled."""
        return max(self.share * beta * self.force_size, TINY)

    def pair(self, beta: float, plus: Settled, minus: Settled) -> Pair:
        """Run the phases at ±β until the share of the nudge that is left is small enough."""
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
        """The contrast of two phases whose nudging strengths differ by `apart`."""
        return self.evaluation.contrast([one, other], [1 / apart, -1 / apart], self.direct)

    def rounding(self, plus: Settled, minus: Settled) -> float:
        """The rounding error of φ relative to the distance between the phases."""
        one, other = flatten(list(plus.params.values())), flatten(list(minus.params.values()))
        moved = (one - other).norm().item()
        return self.eps * one.norm().item() / moved if moved else math.inf

    def cancelled(self, pair: Pair) -> float:
        """The relative rounding error if the contrast is small compared with other directions.

        The other direction is the response with its elements in reverse order.
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
        """Record rounding as the obstacle."""
        self.obstacle = "rounding"
        self.reason = f"{self.dtype} resolves {what} here"
        if self.dtype != torch.float64:
            self.reason += "; use torch.float64"

    @property
    def spent(self) -> bool:
        """Whether the budget is spent."""
        return self.evaluation.tally.gradient_evaluations >= self.budget

    def settle(self, state: Settled, beta: float, tol: float, limit: int | None = None) -> Settled:
        """Continue a phase, or start one at a state, until its residual is at most `tol`.

        Gives up after `limit` steps, or if the residual does not fall, with the cause in
        `obstacle`.
        """
        begun = state.phase if state.phase.beta == beta else None
        keep, chunk = self.keep_momentum or begun is not None, FIRST_LOOK
        before = math.inf
        while True:
            room = self.budget - self.evaluation.tally.gradient_evaluations
            # leave room in the budget: a step with a line search takes several gradients
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
